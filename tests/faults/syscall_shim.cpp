// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Preloaded library that counts the file system calls of a process and, at call number
// CAPSTAN_FAULT_AT, does what CAPSTAN_FAULT says: kill (SIGKILL), ENOSPC, EIO, EROFS, EDQUOT,
// EINTR, or short (a write of half). Faults other than kill and EINTR last until the end, as a full
// disk does. Calls on descriptors 0-2 are not counted.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <cstring>

namespace {

std::atomic<long> calls{0};

struct Fault {
  long at = -1;
  int error = 0;  // errno to set; 0 = kill or short
  bool kill = false, is_short = false, once = false;
  Fault() {
    const char* place = std::getenv("CAPSTAN_FAULT_AT");
    const char* kind = std::getenv("CAPSTAN_FAULT");
    if (place == nullptr || kind == nullptr) return;
    at = std::atol(place);
    kill = std::strcmp(kind, "kill") == 0;
    is_short = std::strcmp(kind, "short") == 0;
    once = std::strcmp(kind, "EINTR") == 0 || is_short;
    if (std::strcmp(kind, "ENOSPC") == 0) error = ENOSPC;
    if (std::strcmp(kind, "EIO") == 0) error = EIO;
    if (std::strcmp(kind, "EROFS") == 0) error = EROFS;
    if (std::strcmp(kind, "EDQUOT") == 0) error = EDQUOT;
    if (std::strcmp(kind, "EINTR") == 0) error = EINTR;
  }
};
const Fault& fault() {
  static const Fault value;
  return value;
}

// True when this call is to fail with errno.
bool strikes() {
  const long call = ++calls;
  const Fault& f = fault();
  if (f.at < 0 || call < f.at || (f.once && call != f.at)) return false;
  if (f.kill) raise(SIGKILL);
  if (f.error == 0) return false;
  errno = f.error;
  return true;
}
bool shortens() { return fault().is_short && calls + 1 == fault().at; }

template <class F>
F real(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

struct Report {  // how many calls there were, for the test's loop
  ~Report() {
    const char* path = std::getenv("CAPSTAN_FAULT_COUNT_FILE");
    if (path == nullptr) return;
    const int fd =
        real<int (*)(const char*, int, ...)>("open")(path, O_CREAT | O_WRONLY | O_TRUNC, 0600);
    char text[32];
    int length = 0;
    for (long value = calls; value > 0 && length < 31; value /= 10)
      text[length++] = static_cast<char>('0' + value % 10);
    for (int i = 0; i < length / 2; ++i) std::swap(text[i], text[length - 1 - i]);
    if (fd >= 0) {
      (void)!real<ssize_t (*)(int, const void*, size_t)>("write")(fd, text,
                                                                  static_cast<size_t>(length));
      real<int (*)(int)>("close")(fd);
    }
  }
} report;

}  // namespace

extern "C" {

int open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if ((flags & (O_CREAT | O_TMPFILE)) != 0) {
    va_list rest;
    va_start(rest, flags);
    mode = va_arg(rest, mode_t);
    va_end(rest);
  }
  if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) != 0 && strikes()) return -1;
  return real<int (*)(const char*, int, ...)>("open")(path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  mode_t mode = 0;
  if ((flags & (O_CREAT | O_TMPFILE)) != 0) {
    va_list rest;
    va_start(rest, flags);
    mode = va_arg(rest, mode_t);
    va_end(rest);
  }
  if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) != 0 && strikes()) return -1;
  return real<int (*)(const char*, int, ...)>("open64")(path, flags, mode);
}
ssize_t write(int fd, const void* data, size_t size) {
  if (fd > 2) {
    if (shortens() && size > 1) size /= 2;
    if (strikes()) return -1;
  }
  return real<ssize_t (*)(int, const void*, size_t)>("write")(fd, data, size);
}
int fsync(int fd) { return strikes() ? -1 : real<int (*)(int)>("fsync")(fd); }
int fdatasync(int fd) { return strikes() ? -1 : real<int (*)(int)>("fdatasync")(fd); }
int close(int fd) {
  const bool fails = fd > 2 && strikes();
  const int saved = errno;
  const int result = real<int (*)(int)>("close")(fd);
  if (fails) errno = saved;
  return fails ? -1 : result;
}
int mkdir(const char* path, mode_t mode) {
  return strikes() ? -1 : real<int (*)(const char*, mode_t)>("mkdir")(path, mode);
}
int rename(const char* from, const char* to) {
  return strikes() ? -1 : real<int (*)(const char*, const char*)>("rename")(from, to);
}
int renameat2(int from_dir, const char* from, int to_dir, const char* to, unsigned flags) {
  return strikes() ? -1
                   : real<int (*)(int, const char*, int, const char*, unsigned)>("renameat2")(
                         from_dir, from, to_dir, to, flags);
}
int unlink(const char* path) { return strikes() ? -1 : real<int (*)(const char*)>("unlink")(path); }
int unlinkat(int dir, const char* path, int flags) {
  return strikes() ? -1 : real<int (*)(int, const char*, int)>("unlinkat")(dir, path, flags);
}
int rmdir(const char* path) { return strikes() ? -1 : real<int (*)(const char*)>("rmdir")(path); }

}  // extern "C"
