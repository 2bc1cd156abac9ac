// PID 1 of the guests of these tests: does what the file /scenario says, tells it to /dev/kmsg, and resets.
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
	file = open("/volumes/answer", O_CREAT | O_WRONLY, 0644);
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
	if (!strcmp(scenario, "panic"))
		return 3; // the end of PID 1 is a kernel panic
	if (!strcmp(scenario, "hang") || !strcmp(scenario, "entropy"))
		for (;;)
			pause();
	if (!strcmp(scenario, "spin"))
		for (;;)
			;
	reboot(RB_AUTOBOOT);
	return 0;
}
