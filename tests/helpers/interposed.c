/* The system calls that a program makes below a folder, counted, and one of them turned into a fault.

   cc -shared -fPIC -o interposed.so interposed.c -ldl; start the program with LD_PRELOAD=interposed.so, and let it call
   `arm` (tests/helpers/interposed.py). Children that it forks afterwards count with it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* What to do at the call: a positive number is the errno with which it fails. */
enum { COUNT = 0, KILL = -1, TEAR = -2, KILL_ONE = -3, VANISH = -4 };

struct plan {
    atomic_long calls;           /* so far, of all processes */
    char folder[PATH_MAX], away[PATH_MAX], kinds[256];
    long first, last;            /* the calls to harm, the first one is 1 */
    int action, log;             /* log: a file descriptor, or -1 */
};
static struct plan *plan;

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })

void disarm(void) {
    if (plan) munmap(plan, sizeof *plan);
    plan = NULL;
}

/* Begin to count calls of some kinds, all that change something if `kinds` is empty. Returns 0 if all is well. */
int arm(const char *folder, const char *kinds, long first, long last, int action, int log) {
    disarm();
    struct plan *new = mmap(NULL, sizeof *new, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (new == MAP_FAILED) return -1;
    snprintf(new->folder, sizeof new->folder, "%s", folder);
    snprintf(new->away, sizeof new->away, "%s.away", folder);
    snprintf(new->kinds, sizeof new->kinds, " %s ", kinds);
    new->first = first, new->last = last, new->action = action, new->log = log;
    plan = new;
    return 0;
}

static int is_of_kind(const char *kind) {
    char word[32];
    snprintf(word, sizeof word, " %s ", kind);
    return plan->kinds[2] ? strstr(plan->kinds, word) != NULL : strcmp(kind, "read") != 0;
}

/* The absolute path of `path` relative to the open folder `at`; that of `at` itself if `path` is NULL. */
static const char *absolute(int at, const char *path, char *place) {
    if (path && path[0] == '/') return path;
    char link[64];
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, place, PATH_MAX - 1);
    if (length < 0) length = 0;
    place[length] = 0;
    if (path) snprintf(place + length, PATH_MAX - length, "/%s", path);
    return place;
}

static void die(void) {
    kill(plan->action == KILL_ONE ? getpid() : 0, SIGKILL); /* 0: the group of processes */
    pause();
}

/* Count a call. Returns 0 if it should happen, -1 with errno set if it should fail, 1 if a write should be torn. */
static int fault(const char *kind, int at, const char *path) {
    char place[PATH_MAX];
    if (!plan || !is_of_kind(kind)) return 0;
    path = absolute(at, path, place);
    size_t length = strlen(plan->folder);
    if (strncmp(path, plan->folder, length) || (path[length] && path[length] != '/')) return 0;
    long number = atomic_fetch_add(&plan->calls, 1) + 1;
    if (plan->log >= 0) dprintf(plan->log, "%ld %s %s\n", number, kind, path + length);
    if (number < plan->first || number > plan->last) return 0;
    switch (plan->action) {
    case COUNT: return 0;
    case KILL: case KILL_ONE: die();
    case TEAR: if (strcmp(kind, "write")) die(); return 1;
    case VANISH: if (number == plan->first) REAL(rename)(plan->folder, plan->away); return 0;
    default: errno = plan->action; return -1;
    }
}

/* Define a function of the C library that may fail, by the path or the open file that it works on. */
#define FUNCTION(result, failed, kind, at, path, name, parameters, arguments) \
    result name parameters { return fault(kind, at, path) ? failed : REAL(name) arguments; }
#define BY_PATH(kind, at, path, name, parameters, arguments) \
    FUNCTION(int, -1, kind, at, path, name, parameters, arguments)
#define BY_FILE(result, kind, name, parameters, arguments) \
    FUNCTION(result, -1, kind, file, NULL, name, parameters, arguments)

#define OPEN_KIND(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT) ? "open" : "read")
#define OPENING(name, at, parameters, arguments) \
    int name parameters { \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = va_arg(list, mode_t); \
        va_end(list); \
        return fault(OPEN_KIND(flags), at, path) ? -1 : REAL(name) arguments; \
    }

OPENING(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENING(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENING(openat, at, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPENING(openat64, at, (int at, const char *path, int flags, ...), (at, path, flags, mode))
FUNCTION(FILE *, NULL, strpbrk(how, "wa+") ? "open" : "read", AT_FDCWD, path, fopen,
         (const char *path, const char *how), (path, how))
FUNCTION(FILE *, NULL, strpbrk(how, "wa+") ? "open" : "read", AT_FDCWD, path, fopen64,
         (const char *path, const char *how), (path, how))

ssize_t write(int file, const void *data, size_t size) {
    int harm = fault("write", file, NULL);
    if (harm < 0) return -1;
    if (harm > 0) REAL(write)(file, data, size / 2), die();
    return REAL(write)(file, data, size);
}
BY_FILE(ssize_t, "write", pwrite, (int file, const void *data, size_t size, off_t place), (file, data, size, place))
BY_FILE(ssize_t, "write", pwrite64, (int file, const void *data, size_t size, off_t place), (file, data, size, place))
BY_FILE(ssize_t, "write", writev, (int file, const struct iovec *data, int num), (file, data, num))
BY_FILE(ssize_t, "write", sendfile, (int file, int from, off_t *place, size_t size), (file, from, place, size))
BY_FILE(ssize_t, "write", sendfile64, (int file, int from, off_t *place, size_t size), (file, from, place, size))
BY_FILE(ssize_t, "write", copy_file_range, (int from, off_t *start, int file, off_t *place, size_t size, unsigned flags),
        (from, start, file, place, size, flags))
BY_FILE(ssize_t, "read", read, (int file, void *data, size_t size), (file, data, size))
BY_FILE(int, "fsync", fsync, (int file), (file))
BY_FILE(int, "fsync", fdatasync, (int file), (file))
BY_FILE(int, "truncate", ftruncate, (int file, off_t size), (file, size))
BY_FILE(int, "truncate", ftruncate64, (int file, off_t size), (file, size))
BY_FILE(int, "chmod", fchmod, (int file, mode_t mode), (file, mode))
BY_FILE(int, "utime", futimens, (int file, const struct timespec *times), (file, times))

BY_PATH("rename", AT_FDCWD, to, rename, (const char *from, const char *to), (from, to))
BY_PATH("rename", at, to, renameat, (int in, const char *from, int at, const char *to), (in, from, at, to))
BY_PATH("rename", at, to, renameat2, (int in, const char *from, int at, const char *to, unsigned flags),
        (in, from, at, to, flags))
BY_PATH("link", AT_FDCWD, to, link, (const char *from, const char *to), (from, to))
BY_PATH("link", at, to, linkat, (int in, const char *from, int at, const char *to, int flags), (in, from, at, to, flags))
BY_PATH("link", AT_FDCWD, path, symlink, (const char *target, const char *path), (target, path))
BY_PATH("unlink", AT_FDCWD, path, unlink, (const char *path), (path))
BY_PATH("unlink", at, path, unlinkat, (int at, const char *path, int flags), (at, path, flags))
BY_PATH("unlink", AT_FDCWD, path, rmdir, (const char *path), (path))
BY_PATH("mkdir", AT_FDCWD, path, mkdir, (const char *path, mode_t mode), (path, mode))
BY_PATH("mkdir", at, path, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode))
BY_PATH("chmod", AT_FDCWD, path, chmod, (const char *path, mode_t mode), (path, mode))
BY_PATH("chmod", at, path, fchmodat, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags))
BY_PATH("utime", at, path, utimensat, (int at, const char *path, const struct timespec *times, int flags),
        (at, path, times, flags))
