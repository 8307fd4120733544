/* Preloaded under a merge: makes the n-th call on files below a folder fail, kill or disturb the process.
   Armed through fault_arm after the fork; until then, and for all other files, calls pass unchanged. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { NONE, KILL, KILL_TORN, INTERRUPT, WRITE_EIO, WRITE_ENOSPC, SHORT, READ_EIO, TRUNCATE, REPLACE, FSYNC_EIO, SLOW };
enum { WRITING, READING, SYNCING, NAMING };

static int kind = NONE;
static long at = -1;
static char folder[4096];
static atomic_long count;

void fault_arm(int k, long n, const char *path) {
    strncpy(folder, path, sizeof folder - 1);
    at = n;
    atomic_store(&count, 0);
    kind = k;
}

long fault_count(void) { return atomic_load(&count); }

static int below(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    if (n <= 0) return 0;
    path[n] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

/* Whether this call, of the class the armed fault counts, is the one. */
static int hit(int call) {
    int counted;
    switch (kind) {
        case NONE: return 0;
        case KILL: case KILL_TORN: case INTERRUPT: counted = call != READING; break;
        case WRITE_EIO: case WRITE_ENOSPC: case SLOW: counted = call == WRITING; break;
        case FSYNC_EIO: counted = call == SYNCING; break;
        case SHORT: counted = call == WRITING || call == READING; break;
        default: counted = call == READING;
    }
    if (!counted) return 0;
    long now = atomic_fetch_add(&count, 1);
    if (kind == SHORT || kind == SLOW) return 1;
    if (now != at) return 0;
    if (kind == KILL || (kind == KILL_TORN && call != WRITING)) raise(SIGKILL), pause();
    if (kind == INTERRUPT) kill(getpid(), SIGINT), usleep(20000);
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static ssize_t writing(int fd, const void *data, size_t n, off_t offset, int positioned) {
    char path[4096];
    if (kind != NONE && below(fd, path) && hit(WRITING)) {
        if (kind == WRITE_EIO) return errno = EIO, -1;
        if (kind == WRITE_ENOSPC) return errno = ENOSPC, -1;
        if (kind == SLOW) usleep((useconds_t)at);
        if ((kind == SHORT || kind == KILL_TORN) && n > 1) n = n / 2;
        if (kind == KILL_TORN) {
            if (positioned) NEXT(pwrite)(fd, data, n, offset);
            else NEXT(write)(fd, data, n);
            raise(SIGKILL), pause();
        }
    }
    return positioned ? NEXT(pwrite)(fd, data, n, offset) : NEXT(write)(fd, data, n);
}

static ssize_t reading(int fd, void *data, size_t n, off_t offset) {
    char path[4096], other[4200];
    if (kind != NONE && below(fd, path) && hit(READING)) {
        if (kind == READ_EIO) return errno = EIO, -1;
        if (kind == SHORT && n > 1) n = n / 3 + 1;
        if (kind == TRUNCATE && truncate(path, 4096)) abort();
        if (kind == REPLACE) {
            snprintf(other, sizeof other, "%s.other", path);
            if (NEXT(rename)(other, path)) abort();
        }
    }
    return NEXT(pread)(fd, data, n, offset);
}

ssize_t pwrite(int fd, const void *d, size_t n, off_t o) { return writing(fd, d, n, o, 1); }
ssize_t pwrite64(int fd, const void *d, size_t n, off64_t o) { return writing(fd, d, n, o, 1); }
ssize_t write(int fd, const void *d, size_t n) { return writing(fd, d, n, 0, 0); }
ssize_t pread(int fd, void *d, size_t n, off_t o) { return reading(fd, d, n, o); }
ssize_t pread64(int fd, void *d, size_t n, off64_t o) { return reading(fd, d, n, o); }

int fsync(int fd) {
    char path[4096];
    if (kind != NONE && below(fd, path) && hit(SYNCING) && kind == FSYNC_EIO) return errno = EIO, -1;
    return NEXT(fsync)(fd);
}

int rename(const char *from, const char *to) {
    if (kind != NONE && strncmp(from, folder, strlen(folder)) == 0) hit(NAMING);
    return NEXT(rename)(from, to);
}

int unlink(const char *path) {
    if (kind != NONE && strncmp(path, folder, strlen(folder)) == 0) hit(NAMING);
    return NEXT(unlink)(path);
}

int posix_fallocate(int fd, off_t offset, off_t n) {
    char path[4096];
    if (kind != NONE && below(fd, path)) hit(NAMING);
    return NEXT(posix_fallocate)(fd, offset, n);
}

int posix_fallocate64(int fd, off64_t offset, off64_t n) { return posix_fallocate(fd, offset, n); }
