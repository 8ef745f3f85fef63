/* Fails chosen writes of the buffer's files: every call that writes or syncs, or only those that sync, is
   counted, and from the `first` so many fail. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static long calls, first, last;
static int failure, only_syncs;

void faults_arm(long from, long count, int error) {
    calls = only_syncs = 0;
    first = from;
    last = from + count;
    failure = error;
}

void faults_arm_syncs(long from, long count, int error) {
    faults_arm(from, count, error);
    only_syncs = 1;
}

long faults_calls(void) { return calls; }

static int fails(int descriptor, int syncs) {
    if (only_syncs && !syncs)
        return 0;
    char link[64], path[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    if (!strstr(path, "/buffer.db"))
        return 0;
    long call = __atomic_fetch_add(&calls, 1, __ATOMIC_SEQ_CST);
    if (call < first || call >= last)
        return 0;
    errno = failure;
    return 1;
}

#define REAL(type, name, ...)                              \
    static type (*real)(__VA_ARGS__);                      \
    if (!real)                                             \
        real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    return fails(descriptor, 0) ? -1 : real(descriptor, data, size, at);
}

int fsync(int descriptor) {
    REAL(int, "fsync", int);
    return fails(descriptor, 1) ? -1 : real(descriptor);
}

int fdatasync(int descriptor) {
    REAL(int, "fdatasync", int);
    return fails(descriptor, 1) ? -1 : real(descriptor);
}

int ftruncate64(int descriptor, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    return fails(descriptor, 0) ? -1 : real(descriptor, size);
}

int posix_fallocate64(int descriptor, off64_t at, off64_t size) {
    REAL(int, "posix_fallocate64", int, off64_t, off64_t);
    return fails(descriptor, 0) ? failure : real(descriptor, at, size);
}
