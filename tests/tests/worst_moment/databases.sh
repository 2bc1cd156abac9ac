# What the container of `databases.rs` runs: each database in its directory, at work until somebody dies. A line on
# the standard output is a transaction that the program has acknowledged. The arguments are the directories; git's
# holds a repository with one commit.
wal=$1 rollback=$2 lmdb=$3 git=$4
export HOME=/ LC_ALL=C GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t
mkdir -p $wal $rollback $lmdb

# sqlite3 writes out what it has printed before it reads the next line. At full speed it would leave the others nothing
# of an emulated CPU.
transactions() {
    /tool ticks 100 | awk -v name=$1 -v mode=$2 'BEGIN {
        printf "PRAGMA journal_mode=%s; PRAGMA synchronous=FULL; ", mode
        print "CREATE TABLE t(n INTEGER PRIMARY KEY, v TEXT); CREATE TABLE sums(total INTEGER);"
        print "INSERT INTO sums VALUES(0);"
    }
    {
        printf "BEGIN; INSERT INTO t VALUES(%d, hex(zeroblob(200)) || %d); ", $1, $1
        printf "UPDATE sums SET total = total + %d; COMMIT; SELECT \047%s %d\047;\n", $1, name, $1
        fflush()
    }'
}

perl -e '
    use LMDB_File qw(:flags);
    my $env = LMDB::Env->new("$ARGV[0]/db", {mapsize => 64 << 20, flags => MDB_NOSUBDIR, mode => 0644});
    my $begin = $env->BeginTxn;
    my $dbi = $begin->OpenDB->dbi;
    $begin->commit;
    $| = 1;
    for (my $n = 1; ; $n++) {
        my $transaction = $env->BeginTxn;
        LMDB_File->new($transaction, $dbi)->put(sprintf("%08d", $n), "v$n," x 50);
        $transaction->commit;
        print "lmdb $n\n";
        select(undef, undef, undef, 0.05);
    }' $lmdb &

transactions wal WAL | sqlite3 -batch -bail $wal/db &
transactions rollback DELETE | sqlite3 -batch -bail $rollback/db &

cd $git
n=2
echo $n >file
while git commit -q -m $n file && read -r id <.git/refs/heads/main && echo "git $n $id"; do
    n=$((n + 1))
    echo $n >file
done
