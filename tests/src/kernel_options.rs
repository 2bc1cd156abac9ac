//! What images of CI systems and of container tools ask of a kernel, and a script for each that
//! uses it.
//!
//! `tests/workloads.rs` runs them with `sh -e` one after the other in one container, which has the
//! programs of `userland` (`$ip` is that of iproute2), a tmpfs on `/scratch`, a volume on `/volume`
//! and the capabilities for all this. Nothing is taken back: the machine ends with the container.

/// A name, and what must succeed.
pub const OPTIONS: &[(&str, &str)] = &[
    ("TUN", "$ip tuntap add dev tun7 mode tun; $ip tuntap add dev tap7 mode tap; $ip link show tap7"),
    ("FUSE", "cd /scratch; mkdir -p fl fu fw fm; echo below >fl/file
        fuse-overlayfs -o lowerdir=fl,upperdir=fu,workdir=fw fm
        grep -q '/scratch/fm fuse' /proc/mounts; grep -q below fm/file; echo new >fm/new; grep -q new fu/new
        umount fm"),
    ("overlayfs, upper on a tmpfs", "mkdir /scratch/overlay; cd /scratch/overlay; sh -e /overlay.sh"),
    ("overlayfs, upper on a volume", "cd /volume; sh -e /overlay.sh"),
    ("ACL of tmpfs", "touch /scratch/acl; setfacl -m u:1000:rw /scratch/acl
        getfacl -n /scratch/acl | grep -q user:1000:rw-"),
    ("attributes of tmpfs", "touch /scratch/attr
        for name in user.a trusted.b security.c; do setfattr -n $name -v value /scratch/attr; done
        [ $(getfattr -d -m - /scratch/attr | grep -c value) = 3 ]"),
    ("keys", "key=$(keyctl add user name secret @s); [ $(keyctl print $key) = secret ]
        keyctl get_persistent @s; keyctl list @s | grep -q _persistent"),
    ("dummy", "if $ip link show dummy0; then exit 1; fi; $ip link add dummy7 type dummy; $ip link set dummy7 up"),
    // A ping between two network namespaces goes over the bridge, and through a rule that sees its
    // ports.
    ("veth, bridge, bridge netfilter, physdev", "$ip link add br7 type bridge; $ip link set br7 up
        for side in 1 2; do
            $ip netns add ns$side
            $ip link add port$side type veth peer name eth0 netns ns$side
            $ip link set port$side master br7 up
            $ip -n ns$side address add 10.7.0.$side/24 dev eth0; $ip -n ns$side link set eth0 up
        done
        iptables-legacy -A FORWARD -m physdev --physdev-in port1 --physdev-is-bridged -j ACCEPT
        $ip netns exec ns1 ping -c 1 -w 20 10.7.0.2
        iptables-legacy -v -n -x -L FORWARD | awk '$3 == \"ACCEPT\" && $1 > 0 { seen = 1 } END { exit !seen }'"),
    ("iptables, legacy", "iptables-legacy-restore --noflush /rules.v4; ip6tables-legacy-restore --noflush /rules.v6
        iptables-legacy -t nat -S | grep -q NETMAP; ip6tables-legacy -S | grep -q hl"),
    ("iptables, nf_tables", "iptables-nft-restore --noflush /rules.v4; ip6tables-nft-restore --noflush /rules.v6
        iptables-nft -t nat -S | grep -q NETMAP; nft list ruleset | grep -q NETMAP"),
    ("nf_tables", "nft -f /rules.nft; nft list table inet seven | grep -q 'ct state established'"),
];

/// Files that the scripts use.
pub const FILES: &[(&str, &str)] = &[
    ("overlay.sh", OVERLAY),
    ("rules.v4", RULES_V4),
    ("rules.v6", RULES_V6),
    ("rules.nft", RULES_NFT),
];

/// A file is changed, one removed, and a directory replaced: copies, a whiteout, an opaque
/// directory.
const OVERLAY: &str =
    "mkdir -p lower/dir upper work merged; touch lower/gone lower/dir/file; echo below >lower/file
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged
echo above >>merged/file; rm merged/gone; rm -r merged/dir; mkdir merged/dir; touch merged/dir/other
[ \"$(cat upper/file)\" = \"$(printf 'below\\nabove')\" ]
[ -c upper/gone ]; [ $(stat -c %t:%T upper/gone) = 0:0 ]
[ $(ls merged/dir) = other ]; if ls merged/gone; then exit 1; fi
umount merged; grep -q below lower/file; ls lower/gone lower/dir/file
";

/// Each match and target that the kernel is built with.
const RULES_V4: &str = "*raw
-A PREROUTING -p tcp -m string --string probe --algo bm -j CT --notrack
COMMIT
*mangle
-A PREROUTING -p tcp -m socket -j MARK --set-mark 7
-A PREROUTING -p tcp -m ttl --ttl-eq 7 -j TPROXY --on-port 7 --tproxy-mark 7
-A PREROUTING -j CONNMARK --restore-mark
-A FORWARD -p tcp --tcp-flags SYN,RST SYN -m tcpmss --mss 1400:1500 -j TCPMSS --clamp-mss-to-pmtu
-A POSTROUTING -p udp -j CHECKSUM --checksum-fill
COMMIT
*nat
-A PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 7 -j DNAT --to-destination 10.7.0.7
-A PREROUTING -p tcp --dport 70 -j REDIRECT --to-ports 7
-A POSTROUTING -m owner --uid-owner 1000 -j SNAT --to-source 10.7.0.7
-A POSTROUTING -s 10.77.0.0/24 -j NETMAP --to 10.78.0.0/24
-A POSTROUTING -m statistic --mode random --probability 0.5 -j MASQUERADE
COMMIT
*filter
-A INPUT -m comment --comment probe -m conntrack --ctstate INVALID -m limit --limit 7/min -j LOG
-A INPUT -p tcp -m multiport --dports 7,70 -m connlimit --connlimit-above 7 -j REJECT
-A INPUT -m recent --set --name seven -j NFLOG --nflog-group 7
-A INPUT -m hashlimit --hashlimit-above 7/min --hashlimit-name seven -j DROP
-A INPUT -m iprange --src-range 10.7.0.7-10.7.0.9 -m length --length 7:9 -m pkttype --pkt-type multicast -j DROP
-A INPUT -m mac --mac-source 02:00:00:00:00:07 -m mark --mark 7 -m connmark --mark 7 -m state --state NEW -j DROP
-A INPUT -m bpf --bytecode \"1,6 0 0 0\" -j DROP
-A FORWARD -m physdev --physdev-in port7 -j DROP
-A FORWARD -p tcp --dport 7 -j NFQUEUE --queue-num 7
COMMIT
";

const RULES_V6: &str = "*raw
-A PREROUTING -p tcp --dport 7 -j CT --notrack
COMMIT
*mangle
-A PREROUTING -p tcp --dport 7 -j MARK --set-mark 7
COMMIT
*nat
-A POSTROUTING -s fd00:7::/64 -j MASQUERADE
COMMIT
*filter
-A INPUT -m hl --hl-eq 7 -j REJECT
COMMIT
";

const RULES_NFT: &str = "table inet seven {
    set ports { type inet_service; flags interval; elements = { 7-70 } }
    map marks { type inet_service : mark; elements = { 7 : 0x7 } }
    chain input {
        type filter hook input priority 0
        ct state established counter accept
        tcp dport @ports ct count over 7 reject
        tcp dport 7 limit rate 7/minute log prefix \"seven\" group 7
        quota over 7 mbytes drop
        meta mark set tcp dport map @marks
        meta mark set numgen inc mod 7
        meta mark set jhash ip saddr mod 7
        fib saddr . iif oif missing drop
        tcp dport 7 queue num 7
        socket transparent 1 meta mark set 7
    }
    chain before {
        type filter hook prerouting priority mangle
        tcp dport 7 tproxy ip to :7 meta mark set 7
    }
    chain source {
        type nat hook postrouting priority srcnat
        ip saddr 10.79.0.0/24 masquerade
    }
    chain destination {
        type nat hook prerouting priority dstnat
        tcp dport 71 redirect to :7
        ip daddr 10.7.0.70 dnat ip to 10.7.0.7
    }
}
table bridge seven {
    chain forward { type filter hook forward priority 0; drop; }
}
table netdev seven {
    chain ingress { type filter hook ingress device lo priority 0; counter; }
}
table arp seven {
    chain input { type filter hook input priority 0; arp operation request accept; }
}
";
