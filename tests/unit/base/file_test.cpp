// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <utility>

#include "capstan/base/error.h"
#include "capstan/base/hash.h"

namespace capstan {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

class File : public testing::Test {
 protected:
  File() {
    std::string name = (fs::temp_directory_path() / "capstan-file-XXXXXX").native();
    folder_ = ::mkdtemp(name.data());
  }
  ~File() override { fs::remove_all(folder_); }
  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(folder_)) {
      out.push_back(entry.path().filename());
    }
    return out;
  }
  Path folder_;
};

template <class Function>
std::string env_failure(Function&& function) {
  try {
    function();
  } catch (const EnvError& error) {
    return error.what();
  }
  return "accepted";
}

TEST_F(File, ReadFile_ReadsAllAndKeepsItsLimit) {
  const std::string content("a\0b\n", 4);
  write_file_atomic(folder_ / "x", content);
  EXPECT_EQ(read_file(folder_ / "x"), content);
  EXPECT_EQ(read_file(folder_ / "x", 4), content);
  EXPECT_THAT(env_failure([&] { (void)read_file(folder_ / "x", 3); }), HasSubstr("more than 3 B"));
  EXPECT_THAT(env_failure([&] { (void)read_file(folder_ / "none"); }),
              HasSubstr("none' failed: got No such file"));
  EXPECT_THAT(env_failure([&] { (void)read_file(folder_); }), HasSubstr("Is a directory"));
  EXPECT_THAT(read_file("/proc/self/status"), HasSubstr("Name:")) << "the size reads 0 there";
}

TEST_F(File, WriteAtomic_ReplacesAndLeavesNothingElse) {
  write_file_atomic(folder_ / "x", "old");
  write_file_atomic(folder_ / "x", "new");
  EXPECT_EQ(read_file(folder_ / "x"), "new");
  EXPECT_THAT(names(), testing::ElementsAre("x"));
  EXPECT_THROW(write_file_atomic(folder_ / "no" / "x", "new"), EnvError);
}

TEST_F(File, WriteAtomic_FailureKeepsTheOldContent) {
  write_file_atomic(folder_ / "x", "old");
  fs::create_directory(folder_ / "taken");
  EXPECT_THROW(write_file_atomic(folder_ / "taken", "new"), EnvError);
  EXPECT_THAT(names(), testing::UnorderedElementsAre("x", "taken"));
  // A file size limit is the portable form of a full disk; it needs a process of its own.
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {1000, 1000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    try {
      write_file_atomic(folder_ / "x", std::string(100000, 'n'));
    } catch (const EnvError& error) {
      ::_exit(std::string(error.what()).find("File too large") != std::string::npos ? 0 : 2);
    }
    ::_exit(1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(read_file(folder_ / "x"), "old");
  EXPECT_THAT(names(), testing::UnorderedElementsAre("x", "taken"));
}

TEST_F(File, WriteAtomic_ReadersNeverSeeAPart) {
  const std::string a(200000, 'a'), b(300000, 'b');
  write_file_atomic(folder_ / "x", a);
  const pid_t child = ::fork();
  if (child == 0) {
    for (int i = 0; i < 40; ++i) write_file_atomic(folder_ / "x", i % 2 == 0 ? b : a);
    ::_exit(0);
  }
  int status = 0;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    const std::string seen = read_file(folder_ / "x");
    ASSERT_TRUE(seen == a || seen == b) << seen.size();
  }
  EXPECT_EQ(status, 0);
}

TEST_F(File, Writer_HashesAndCounts) {
  FileWriter writer(folder_ / "x");
  std::string whole;
  for (int i = 0; i < 50; ++i) {
    const std::string part(static_cast<size_t>(i * 2000), static_cast<char>('a' + i % 26));
    writer.write(part);
    whole += part;
  }
  const std::string large(size_t{3} << 20, 'z');
  writer.write(large);
  whole += large;
  EXPECT_EQ(writer.size(), static_cast<int64_t>(whole.size()));
  EXPECT_EQ(writer.close(), xxh3_128_hex(whole));
  EXPECT_TRUE(read_file(folder_ / "x") == whole);
}

TEST_F(File, Writer_RefusesAnExistingFileAndRemovesAnUnclosedOne) {
  write_file_atomic(folder_ / "x", "keep");
  EXPECT_THROW(FileWriter(folder_ / "x"), EnvError);
  {
    FileWriter writer(folder_ / "y");
    writer.write("half");
    FileWriter moved = std::move(writer);
    EXPECT_TRUE(fs::exists(folder_ / "y"));
  }
  EXPECT_THAT(names(), testing::ElementsAre("x"));
  EXPECT_EQ(read_file(folder_ / "x"), "keep");
}

TEST_F(File, Writer_FailedWriteIsFinal) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {1000, 1000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    FileWriter small(folder_ / "small");
    int failures = 0;
    try {
      small.write(std::string(size_t{2} << 20, 'x'));
    } catch (const EnvError&) {
      ++failures;
    }
    try {
      (void)small.close();
    } catch (const InternalError&) {
      ++failures;
    }
    small = FileWriter(folder_ / "other");
    ::_exit(failures == 2 && !fs::exists(folder_ / "small") ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  FileWriter writer(folder_ / "x");
  (void)writer.close();
  EXPECT_THROW(writer.write("after close"), InternalError);
}

TEST_F(File, RenameNoReplace_KeepsTheTarget) {
  write_file_atomic(folder_ / "a", "a");
  write_file_atomic(folder_ / "b", "b");
  EXPECT_FALSE(rename_no_replace(folder_ / "a", folder_ / "b"));
  EXPECT_EQ(read_file(folder_ / "b"), "b");
  EXPECT_TRUE(rename_no_replace(folder_ / "a", folder_ / "c"));
  EXPECT_EQ(read_file(folder_ / "c"), "a");
  fs::create_directory(folder_ / "d1");
  fs::create_directory(folder_ / "d2");
  EXPECT_FALSE(rename_no_replace(folder_ / "d1", folder_ / "d2")) << "even an empty folder";
  EXPECT_TRUE(rename_no_replace(folder_ / "d1", folder_ / "d3"));
  EXPECT_THROW((void)rename_no_replace(folder_ / "none", folder_ / "e"), EnvError);
}

TEST_F(File, CreateDirectories_MakesAllParents) {
  create_directories_durable(folder_ / "a/b/c/");
  EXPECT_TRUE(fs::is_directory(folder_ / "a/b/c"));
  create_directories_durable(folder_ / "a/b");
  write_file_atomic(folder_ / "file", "x");
  EXPECT_THROW(create_directories_durable(folder_ / "file"), EnvError);
  EXPECT_THROW(create_directories_durable(folder_ / "file/below"), EnvError);
}

TEST_F(File, FreeDisk_AsksTheNearestParent) {
  EXPECT_GT(free_disk_bytes(folder_), 0);
  EXPECT_GT(free_disk_bytes(folder_ / "not" / "yet"), 0);
}

TEST_F(File, MappedFile_ShowsTheContent) {
  write_file_atomic(folder_ / "x", "hello");
  MappedFile file(folder_ / "x");
  MappedFile moved = std::move(file);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(moved.bytes().data()), moved.bytes().size()),
            "hello");
  write_file_atomic(folder_ / "empty", "");
  EXPECT_TRUE(MappedFile(folder_ / "empty").bytes().empty());
  EXPECT_THAT(env_failure([&] { MappedFile bad(folder_); }), HasSubstr("got a folder"));
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(env_failure([&] { MappedFile bad(folder_ / "pipe"); }), HasSubstr("a special file"));
}

TEST_F(File, Lock_IsSeenByAnotherProcessAndEndsWithItsHolder) {
  const Path path = folder_ / "lock";
  int ready[2], go[2];
  ASSERT_EQ(::pipe2(ready, O_CLOEXEC), 0);
  ASSERT_EQ(::pipe2(go, O_CLOEXEC), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    std::string holder;
    const auto lock = LockFile::try_acquire(path, "pid 77 on host x", &holder);
    char byte = lock ? 'y' : 'n';
    (void)!::write(ready[1], &byte, 1);
    (void)!::read(go[0], &byte, 1);
    ::_exit(0);  // without the destructor, like a killed process
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  ASSERT_EQ(byte, 'y');
  std::string holder;
  EXPECT_EQ(LockFile::try_acquire(path, "me", &holder), nullptr);
  EXPECT_EQ(holder, "pid 77 on host x");
  ASSERT_EQ(::write(go[1], &byte, 1), 1);
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  auto lock = LockFile::try_acquire(path, "me", &holder);
  ASSERT_NE(lock, nullptr);
  EXPECT_EQ(read_file(path), "me") << "the longer old content is gone";
  EXPECT_EQ(LockFile::try_acquire(path, "again", &holder), nullptr) << "also within a process";
  lock.reset();
  EXPECT_NE(LockFile::try_acquire(path, "again", nullptr), nullptr);
  for (const int end : {ready[0], ready[1], go[0], go[1]}) ::close(end);
}

}  // namespace
}  // namespace capstan
