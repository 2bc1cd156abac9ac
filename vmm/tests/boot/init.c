// PID 1 of the guests of these tests: does what the file /scenario says, tells it to /dev/kmsg, and resets.
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define DRIVER "/sys/bus/platform/drivers/virtio-mmio/"
#define ENTROPY "virtio-mmio.3"
#define DEVICE "/sys/bus/platform/devices/" ENTROPY "/"

static void say(const char *format, ...)
{
	char line[256];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	int log = open("/dev/kmsg", O_WRONLY);
	if (log >= 0 && write(log, line, length) < 0)
		_exit(1);
	close(log);
}

static int put(const char *path, const char *text)
{
	int file = open(path, O_WRONLY);
	int done = file >= 0 && write(file, text, strlen(text)) == (ssize_t)strlen(text);
	if (file >= 0)
		close(file);
	return done;
}

// A device filled in after boot: bound, then read from until it has given 32 bytes that differ.
static void bind_entropy(void)
{
	unsigned char bytes[32] = {0};
	while (access(DEVICE "virtio0/driver", F_OK) && access(DEVICE "virtio1/driver", F_OK)) {
		put(DRIVER "bind", ENTROPY);
		usleep(10000);
	}
	mknod("/dev/hwrng", S_IFCHR | 0600, makedev(10, 183));
	int device = open("/dev/hwrng", O_RDONLY);
	ssize_t got = device < 0 ? -1 : read(device, bytes, sizeof(bytes));
	int different = 0;
	for (size_t index = 1; index < sizeof(bytes); index++)
		different |= bytes[index] != bytes[0];
	say("entropy: %zd bytes, %s", got, different ? "random" : "constant");
}

// The disk in a slot, as /dev/vda, bound or made to be.
static int open_disk(const char *slot, int flags)
{
	char path[128], name[32] = "";
	unsigned major = 0, minor = 0;
	put(DRIVER "unbind", slot);
	if (!put(DRIVER "bind", slot))
		return -1;
	for (int number = 0; number < 8; number++) {
		snprintf(path, sizeof(path), "/sys/bus/platform/devices/%s/virtio%d/block", slot, number);
		DIR *folder = opendir(path);
		for (struct dirent *entry; folder && (entry = readdir(folder));)
			if (entry->d_name[0] != '.')
				snprintf(name, sizeof(name), "%.30s", entry->d_name);
		if (folder)
			closedir(folder);
	}
	snprintf(path, sizeof(path), "/sys/class/block/%s/dev", name);
	FILE *numbers = fopen(path, "r");
	if (!numbers || fscanf(numbers, "%u:%u", &major, &minor) != 2)
		return -1;
	fclose(numbers);
	unlink("/disk");
	mknod("/disk", S_IFBLK | 0600, makedev(major, minor));
	return open("/disk", flags);
}

// The disk that the host has put into slot 12 for this round: an earlier one may still be there.
static int await_disk(int round, char *block)
{
	char wanted[16];
	snprintf(wanted, sizeof(wanted), "disk %d.", round);
	for (;;) {
		int disk = open_disk("virtio-mmio.12", O_RDWR | O_DIRECT);
		if (disk >= 0 && pread(disk, block, 4096, 0) == 4096 && !strncmp(block, wanted, strlen(wanted)))
			return disk;
		if (disk >= 0)
			close(disk);
		put(DRIVER "unbind", "virtio-mmio.12");
		usleep(20000);
	}
}

// Disks that come after boot and go again, a second one read-only; the last one stays.
static void disks(void)
{
	static char block[1 << 20] __attribute__((aligned(4096)));
	for (int round = 1; round <= 2; round++) {
		int disk = await_disk(round, block);
		memset(block, '0' + round, sizeof(block));
		long written = pwrite(disk, block, sizeof(block), 1 << 20);
		int synced = fsync(disk);
		memset(block, 0, sizeof(block));
		long got = pread(disk, block, sizeof(block), 1 << 20);
		say("disk %d: wrote %ld, synced %d, read %ld of '%c'", round, written, synced, got, block[4711]);
		say("disk %d: size %ld", round, (long)lseek(disk, 0, SEEK_END));
		close(disk);
		int other;
		while ((other = open_disk("virtio-mmio.13", O_RDONLY)) < 0)
			usleep(20000);
		int writable = open("/disk", O_RDWR);
		got = read(other, block, 512);
		written = pwrite(writable, block, 512, 0);
		say("disk %d: read-only %ld bytes, for writing %ld", round, got, written);
		close(writable);
		close(other);
		if (!put(DRIVER "unbind", "virtio-mmio.12") || !put(DRIVER "unbind", "virtio-mmio.13"))
			say("disk: no unbind: %m");
		say("disk %d: over", round);
	}
	await_disk(3, block);
	say("disk 3: held");
	pause();
}

// What /proc/cpuinfo and /sys say of the topology, and of virtualisation.
static void cpus(void)
{
	static char line[8192];
	int packages = 0, cores = 0, alone = 1, nesting = 0;
	mkdir("/proc", 0755);
	mount("none", "/proc", "proc", 0, 0);
	FILE *info = fopen("/proc/cpuinfo", "r");
	while (info && fgets(line, sizeof(line), info)) {
		int number;
		if (sscanf(line, "physical id : %d", &number) == 1 && number >= packages)
			packages = number + 1;
		if (sscanf(line, "core id : %d", &number) == 1 && number >= cores)
			cores = number + 1;
		if (!strncmp(line, "flags", 5))
			nesting |= strstr(line, " svm ") || strstr(line, " vmx ");
	}
	for (int cpu = 0; cpu < sysconf(_SC_NPROCESSORS_ONLN); cpu++) {
		char path[96];
		snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
		FILE *list = fopen(path, "r");
		alone &= list && fgets(line, sizeof(line), list) && !strpbrk(line, ",-");
		if (list)
			fclose(list);
	}
	say("cpus: %d packages, %d cores, threads %s, nesting %s", packages, cores, alone ? "alone" : "shared",
	    nesting ? "offered" : "none");
}

// Reads a file of one share and writes one to the other.
static void shares(void)
{
	char text[64] = "";
	// Unbound and bound again, so that the server meets a device for the second time.
	if (!put(DRIVER "unbind", "virtio-mmio.0") || !put(DRIVER "bind", "virtio-mmio.0"))
		say("no second bind: %m");
	mkdir("/rootfs", 0755);
	mkdir("/volumes", 0755);
	if (mount("rootfs", "/rootfs", "virtiofs", 0, 0) || mount("volumes", "/volumes", "virtiofs", 0, 0))
		say("no mount: %m");
	int file = open("/rootfs/greeting", O_RDONLY);
	if (file < 0 || read(file, text, sizeof(text) - 1) < 0)
		say("no greeting: %m");
	file = open("/volumes/v/answer", O_CREAT | O_WRONLY, 0644);
	if (file < 0 || write(file, "from the guest", 14) != 14)
		say("no answer: %m");
	close(file);
	say("fs: %s", text);
	pause();
}

int main(void)
{
	char scenario[32] = "";
	mkdir("/dev", 0755);
	mkdir("/sys", 0755);
	mount("none", "/dev", "devtmpfs", 0, 0);
	mount("none", "/sys", "sysfs", 0, 0);
	int file = open("/scenario", O_RDONLY);
	if (file < 0 || read(file, scenario, sizeof(scenario) - 1) < 0)
		say("no scenario");
	say("init: %ld cpus, %s", sysconf(_SC_NPROCESSORS_ONLN), scenario);
	if (!strcmp(scenario, "entropy"))
		bind_entropy();
	if (!strcmp(scenario, "fs"))
		shares();
	if (!strcmp(scenario, "disks"))
		disks();
	if (!strcmp(scenario, "cpus"))
		cpus();
	if (!strcmp(scenario, "panic"))
		return 3; // the end of PID 1 is a kernel panic
	if (!strcmp(scenario, "hang") || !strcmp(scenario, "cpus") || !strcmp(scenario, "entropy"))
		for (;;)
			pause();
	if (!strcmp(scenario, "spin"))
		for (;;)
			;
	reboot(RB_AUTOBOOT);
	return 0;
}
