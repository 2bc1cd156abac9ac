// PID 1 of the guests in main.rs: dials the host once, then does what its streams ask for.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <sys/ioctl.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <unistd.h>

#define AGENT 1024
#define STREAMS 1025

static int dial(unsigned port)
{
	struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
	int stream = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (connect(stream, (struct sockaddr *)&host, sizeof(host)) == 0)
		return stream;
	int why = errno;
	close(stream);
	return -why;
}

static void write_all(int to, const char *bytes, ssize_t length)
{
	while (length > 0) {
		ssize_t sent = write(to, bytes, length);
		if (sent <= 0)
			_exit(1);
		bytes += sent;
		length -= sent;
	}
}

// Gives back every byte, and the end of file.
static void echo(int stream)
{
	static char bytes[100000];
	ssize_t got;
	while ((got = read(stream, bytes, sizeof(bytes))) > 0)
		write_all(stream, bytes, got);
}

// A POSIX lock of a whole file (or a BSD one), taken and let go.
static int lock(const char *path, int bsd)
{
	struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	int file = open(path, O_RDWR | O_CREAT, 0644);
	int result = file < 0 ? -1 : bsd ? flock(file, LOCK_EX | LOCK_NB) : fcntl(file, F_SETLK, &whole);
	int why = errno;
	close(file);
	errno = why;
	return result;
}

// An overlay whose upper folder is in `path`: a file of the lower one removed, a folder replaced.
static int overlay(const char *path)
{
	char options[1024];
	if (chdir(path) || mkdir("lower", 0755) || mkdir("lower/folder", 0755) || mkdir("upper", 0755) ||
	    mkdir("work", 0755) || mkdir("merged", 0755))
		return -1;
	close(open("lower/gone", O_CREAT | O_WRONLY, 0644));
	close(open("lower/folder/old", O_CREAT | O_WRONLY, 0644));
	snprintf(options, sizeof(options), "lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", path, path, path);
	if (mount("overlay", "merged", "overlay", 0, options))
		return -2;
	if (unlink("merged/gone") || unlink("merged/folder/old") || rmdir("merged/folder") ||
	    mkdir("merged/folder", 0755))
		return -3;
	int left = !access("merged/gone", F_OK) || !access("merged/folder/old", F_OK);
	if (umount("merged") || mount("overlay", "merged", "overlay", 0, options))
		return -4;
	left |= !access("merged/gone", F_OK) || !access("merged/folder/old", F_OK);
	return umount("merged") || left ? -5 : 0;
}

// As user 1000 with group 2000 beside its own: makes a file.
static int as_member(const char *path)
{
	int status = 0;
	pid_t child = fork();
	if (child == 0) {
		gid_t group = 2000;
		if (setgroups(1, &group) || setgid(1000) || setuid(1000))
			_exit(200);
		_exit(open(path, O_CREAT | O_EXCL | O_WRONLY, 0640) < 0 ? errno : 0);
	}
	if (waitpid(child, &status, 0) != child)
		return -1;
	errno = WEXITSTATUS(status);
	return status ? -1 : 0;
}

static int put(const char *path, const char *text)
{
	int file = open(path, O_WRONLY);
	int result = file < 0 ? -1 : write(file, text, strlen(text));
	int why = errno;
	close(file);
	errno = why;
	return result;
}

static const char *get(const char *path)
{
	static char text[64];
	int file = open(path, O_RDONLY);
	ssize_t length = file < 0 ? 0 : read(file, text, sizeof(text) - 1);
	text[length > 0 ? length - 1 : 0] = 0;
	close(file);
	return text;
}

// Binds a slot, gives its interface this address, and echoes TCP on port 7 there. Tells what the driver was told.
static int interface(const char *slot, const char *address, char *answer)
{
	struct ifreq request = {.ifr_name = "eth0"};
	struct sockaddr_in *own = (struct sockaddr_in *)&request.ifr_addr;
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(7)};
	mkdir("/sys", 0755);
	mount("none", "/sys", "sysfs", 0, 0);
	if (put("/sys/bus/platform/drivers/virtio-mmio/bind", slot) < 0)
		return -1;
	strcat(answer, " ");
	strcat(answer, get("/sys/class/net/eth0/address"));
	strcat(answer, " ");
	strcat(answer, get("/sys/class/net/eth0/mtu"));
	int socket_fd = socket(AF_INET, SOCK_STREAM, 0);
	own->sin_family = AF_INET;
	inet_aton(address, &own->sin_addr);
	if (ioctl(socket_fd, SIOCSIFADDR, &request))
		return -2;
	request.ifr_flags = IFF_UP | IFF_RUNNING;
	if (ioctl(socket_fd, SIOCSIFFLAGS, &request))
		return -3;
	int listens = bind(socket_fd, (struct sockaddr *)&here, sizeof(here)) == 0 && listen(socket_fd, 8) == 0;
	if (!listens && errno != EADDRINUSE) // by the interface before
		return -4;
	if (listens && fork() == 0)
		for (;;) {
			int stream = accept(socket_fd, 0, 0);
			if (stream >= 0)
				echo(stream);
			close(stream);
		}
	close(socket_fd);
	return 0;
}

// One word after the other: a file operation, its path, its argument. Answers "ok …" or "error N".
static void files(int stream)
{
	static char line[4096];
	FILE *in = fdopen(dup(stream), "r");
	signal(SIGCHLD, SIG_DFL);
	while (fgets(line, sizeof(line), in)) {
		char verb[16] = "", path[256] = "", argument[256] = "", answer[1024] = "ok";
		sscanf(line, "%15s %255s %255[^\n]", verb, path, argument);
		long result = 0;
		errno = 0;
		if (!strcmp(verb, "mount")) {
			mkdir(path, 0755);
			result = mount(argument, path, "virtiofs", 0, 0);
		} else if (!strcmp(verb, "umount")) {
			result = umount(path);
		} else if (!strcmp(verb, "read") || !strcmp(verb, "write")) {
			int writes = verb[0] == 'w';
			int file = open(path, writes ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0644);
			result = file;
			if (file >= 0 && writes)
				result = write(file, argument, strlen(argument));
			if (file >= 0 && !writes && (result = read(file, answer + 3, 1000)) >= 0)
				answer[2] = ' ';
			if (file >= 0)
				close(file);
		} else if (!strcmp(verb, "mkdir")) {
			result = mkdir(path, 0755);
		} else if (!strcmp(verb, "mknod")) {
			result = mknod(path, S_IFCHR | 0600, 0x103);
		} else if (!strcmp(verb, "lock") || !strcmp(verb, "flock")) {
			result = lock(path, verb[0] == 'f');
		} else if (!strcmp(verb, "overlay")) {
			result = overlay(path);
		} else if (!strcmp(verb, "member")) {
			result = as_member(path);
		} else if (!strcmp(verb, "tmpfile")) {
			result = open(path, O_TMPFILE | O_RDWR, 0600);
		} else if (!strcmp(verb, "interface")) {
			result = interface(path, argument, answer);
		} else if (!strcmp(verb, "unbind")) {
			result = put("/sys/bus/platform/drivers/virtio-mmio/unbind", path);
		} else if (!strcmp(verb, "mkfifo")) {
			result = mkfifo(path, 0600);
		} else if (!strcmp(verb, "rename")) {
			result = rename(path, argument);
		} else if (!strcmp(verb, "unlink")) {
			result = unlink(path);
		} else if (!strcmp(verb, "chown")) {
			result = chown(path, atoi(argument), atoi(argument));
		} else if (!strcmp(verb, "setxattr")) {
			result = setxattr(path, "user.test", argument, strlen(argument), 0);
		} else if (!strcmp(verb, "getxattr")) {
			if ((result = getxattr(path, "user.test", answer + 3, 1000)) >= 0)
				answer[2] = ' ';
		} else if (!strcmp(verb, "device")) {
			struct stat about;
			if ((result = stat(path, &about)) == 0)
				sprintf(answer, "ok %lu", (unsigned long)about.st_dev);
		} else if (!strcmp(verb, "list")) {
			DIR *directory = opendir(path);
			result = directory ? 0 : -1;
			for (struct dirent *entry; directory && (entry = readdir(directory));)
				if (entry->d_name[0] != '.')
					strcat(strcat(answer, " "), entry->d_name);
			if (directory)
				closedir(directory);
		} else if (!strcmp(verb, "large")) {
			// 16 MiB written, synced and read back.
			static char block[1 << 20], back[1 << 20];
			int file = open(path, O_RDWR | O_CREAT, 0644);
			for (int index = 0; index < 16; index++) {
				memset(block, 'a' + index, sizeof(block));
				write_all(file, block, sizeof(block));
			}
			result = fsync(file);
			for (int index = 0; index < 16 && result == 0; index++) {
				memset(block, 'a' + index, sizeof(block));
				if (pread(file, back, sizeof(back), (off_t)index << 20) != sizeof(back) ||
				    memcmp(block, back, sizeof(block)))
					result = -1;
			}
			close(file);
		} else {
			result = -1;
			errno = ENOSYS;
		}
		if (result < 0)
			sprintf(answer, "error %d", errno);
		if (result < -1)
			sprintf(answer, "error %d at %ld", errno, -result);
		strcat(answer, "\n");
		write_all(stream, answer, strlen(answer));
	}
}

static void serve(int stream)
{
	char what;
	if (read(stream, &what, 1) != 1)
		_exit(0);
	if (what == 'e')
		echo(stream);
	if (what == 'f')
		files(stream);
	if (what == 'x') // a reader that never reads
		for (;;)
			pause();
	if (what == 'r') // a flood of connections that nobody accepts
		for (int count = 0; count < 500; count++) {
			int refused = dial(count % 2 ? AGENT : 5000 + count);
			if (refused >= 0)
				write_all(stream, "connected", 9);
		}
	static char data[30000];
	if (what == 'd') // sends until it is told that nobody listens
		for (;;)
			write_all(stream, data, sizeof(data));
}

int main(void)
{
	struct sockaddr_vm any = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = STREAMS};
	char line[128];
	mkdir("/dev", 0755);
	mount("none", "/dev", "devtmpfs", 0, 0);
	signal(SIGCHLD, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	bind(listener, (struct sockaddr *)&any, sizeof(any));
	listen(listener, 128);
	int stranger = dial(9);
	int agent = dial(AGENT);
	int again = dial(AGENT);
	snprintf(line, sizeof(line), "hello %d %d\n", -stranger, -again);
	write_all(agent, line, strlen(line));
	for (;;) {
		int stream = accept(listener, 0, 0);
		if (stream < 0)
			continue;
		if (fork() == 0) {
			close(listener);
			serve(stream);
			_exit(0);
		}
		close(stream);
	}
}
