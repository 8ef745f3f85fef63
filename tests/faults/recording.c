/* Records, in one order, what is done to the files whose names begin with RECORDED, into the file RECORDING. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* As `power.py` reads it: then follow the name, and for a write its data. */
struct record {
    uint32_t kind, name;
    uint64_t file, at, size;
};

static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;
static const char *prefix;
static size_t prefix_size, folder_size;
static int recording = -1;

#define REAL(type, name, ...)                              \
    static type (*real)(__VA_ARGS__);                      \
    if (!real)                                             \
        real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

__attribute__((constructor)) static void begin(void) {
    prefix = getenv("RECORDED");
    const char *name = getenv("RECORDING");
    if (!prefix || !name)
        return;
    prefix_size = strlen(prefix);
    folder_size = (size_t)(strrchr(prefix, '/') - prefix);
    REAL(int, "open64", const char *, int, ...);
    int descriptor = real(name, O_WRONLY | O_APPEND | O_CLOEXEC);
    recording = fcntl(descriptor, F_DUPFD_CLOEXEC, 900); /* out of the way of whoever counts on low numbers */
    close(descriptor);
}

static int ours(const char *path) {
    return recording >= 0 && path && strncmp(path, prefix, prefix_size) == 0;
}

/* The name of an open file; whether it is one of ours or, where `folder` asks so, the folder of them. */
static int named(int descriptor, char *path, size_t size, int folder) {
    if (recording < 0)
        return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, size - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    if (folder)
        return (size_t)length == folder_size && strncmp(path, prefix, folder_size) == 0;
    return ours(path);
}

static uint64_t file_of(int descriptor) {
    struct stat found;
    return fstat(descriptor, &found) ? 0 : found.st_ino;
}

/* One write(2) in append mode: also what other processes append comes before it or after it. */
static void note(char kind, uint64_t file, uint64_t at, uint64_t size, const char *name, size_t name_size,
                 const struct iovec *data, int count) {
    struct record head = {(uint32_t)kind, (uint32_t)name_size, file, at, size};
    struct iovec parts[10] = {{&head, sizeof head}, {(void *)name, name_size}};
    uint64_t left = size;
    int used = 2;
    for (int number = 0; number < count && left > 0; number++) {
        parts[used] = data[number];
        if (parts[used].iov_len > left)
            parts[used].iov_len = left;
        left -= parts[used++].iov_len;
    }
    int before = errno;
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (real(recording, parts, used) < 0)
        abort();
    errno = before;
}

static void note_write(int descriptor, off64_t at, ssize_t size, const struct iovec *data, int count) {
    if (size > 0)
        note('W', file_of(descriptor), (uint64_t)at, (uint64_t)size, "", 0, data, count);
}

static void note_names(char kind, const char *from, const char *to) {
    char both[1024];
    int length = snprintf(both, sizeof both, "%s%s%s", from + folder_size + 1, to ? "\n" : "",
                          to ? to + folder_size + 1 : "");
    note(kind, 0, 0, 0, both, (size_t)length, NULL, 0);
}

/* The call and its record are one step: no other record comes between them. */
#define RECORDED(type, result, call, success, what)        \
    pthread_mutex_lock(&order);                            \
    type result = call;                                    \
    if (success)                                           \
        what;                                              \
    pthread_mutex_unlock(&order);                          \
    return result

#define WATCHED(descriptor)                                \
    char path[512];                                        \
    int watched = named(descriptor, path, sizeof path, 0)

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    WATCHED(descriptor);
    if (!watched)
        return real(descriptor, data, size);
    struct iovec part = {(void *)data, size};
    RECORDED(ssize_t, done, real(descriptor, data, size), done > 0,
             note_write(descriptor, lseek64(descriptor, 0, SEEK_CUR) - done, done, &part, 1));
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    WATCHED(descriptor);
    if (!watched)
        return real(descriptor, parts, count);
    if (count > 8)
        abort(); /* nobody does */
    RECORDED(ssize_t, done, real(descriptor, parts, count), done > 0,
             note_write(descriptor, lseek64(descriptor, 0, SEEK_CUR) - done, done, parts, count));
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    WATCHED(descriptor);
    if (!watched)
        return real(descriptor, data, size, at);
    struct iovec part = {(void *)data, size};
    RECORDED(ssize_t, done, real(descriptor, data, size, at), done > 0,
             note_write(descriptor, at, done, &part, 1));
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) {
    return pwrite64(descriptor, data, size, at);
}

static void note_size(char kind, int descriptor, uint64_t at, uint64_t size) {
    struct record head = {(uint32_t)kind, 0, file_of(descriptor), at, size};
    struct iovec part = {&head, sizeof head};
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (real(recording, &part, 1) < 0)
        abort();
}

int ftruncate64(int descriptor, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    WATCHED(descriptor);
    if (!watched)
        return real(descriptor, size);
    RECORDED(int, done, real(descriptor, size), !done, note_size('T', descriptor, 0, (uint64_t)size));
}

int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }

int truncate64(const char *path, off64_t size) {
    int descriptor = open(path, O_WRONLY | O_CLOEXEC);
    if (descriptor < 0)
        return -1;
    int done = ftruncate64(descriptor, size);
    close(descriptor);
    return done;
}

int truncate(const char *path, off_t size) { return truncate64(path, size); }

int posix_fallocate64(int descriptor, off64_t at, off64_t size) {
    REAL(int, "posix_fallocate64", int, off64_t, off64_t);
    WATCHED(descriptor);
    if (!watched)
        return real(descriptor, at, size);
    RECORDED(int, done, real(descriptor, at, size), !done,
             note_size('A', descriptor, (uint64_t)at, (uint64_t)size));
}

int posix_fallocate(int descriptor, off_t at, off_t size) { return posix_fallocate64(descriptor, at, size); }

int fallocate64(int descriptor, int mode, off64_t at, off64_t size) {
    REAL(int, "fallocate64", int, int, off64_t, off64_t);
    WATCHED(descriptor);
    if (!watched)
        return real(descriptor, mode, at, size);
    RECORDED(int, done, real(descriptor, mode, at, size), !done,
             note_size(mode ? 'P' : 'A', descriptor, (uint64_t)at, (uint64_t)size));
}

int fallocate(int descriptor, int mode, off_t at, off_t size) {
    return fallocate64(descriptor, mode, at, size);
}

static int synced(int descriptor, int (*real)(int)) {
    char path[512];
    int file = named(descriptor, path, sizeof path, 0);
    if (!file && !named(descriptor, path, sizeof path, 1))
        return real(descriptor);
    /* Of a folder's sync that failed nothing is known that the next does not mend. */
    RECORDED(int, done, real(descriptor), file || !done,
             note_size(file ? (done ? 'E' : 'S') : 'F', descriptor, 0, 0));
}

int fsync(int descriptor) {
    REAL(int, "fsync", int);
    return synced(descriptor, real);
}

int fdatasync(int descriptor) {
    REAL(int, "fdatasync", int);
    return synced(descriptor, real);
}

static int opened(const char *path, int flags, mode_t mode) {
    REAL(int, "open64", const char *, int, ...);
    if (!(flags & (O_CREAT | O_TRUNC)) || !ours(path))
        return real(path, flags, mode);
    RECORDED(int, descriptor, real(path, flags, mode), descriptor >= 0, ({
                 if (flags & O_CREAT)
                     note('C', file_of(descriptor), 0, 0, path + folder_size + 1,
                          strlen(path) - folder_size - 1, NULL, 0);
                 if (flags & O_TRUNC)
                     note_size('T', descriptor, 0, 0);
             }));
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return opened(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return opened(path, flags, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (!ours(from) && !ours(to))
        return real(from, to);
    RECORDED(int, done, real(from, to), !done, note_names('R', from, to));
}

int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    if (!ours(from) && !ours(to))
        return real(from, to);
    RECORDED(int, done, real(from, to), !done, note_names('L', from, to));
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    if (!ours(path))
        return real(path);
    RECORDED(int, done, real(path), !done, note_names('U', path, NULL));
}
