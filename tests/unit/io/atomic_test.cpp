// SPDX-License-Identifier: Apache-2.0
// Outputs that appear whole or not at all: directories and files, what killed runs left of them,
// and two runs to one place.
#include "qeft/io/atomic_directory.hpp"

#include <set>
#include <stdexcept>

#include "support/catch.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft;
using namespace qeft::io;
using namespace qeft_test;
namespace fs = std::filesystem;

namespace {

std::vector<std::string> notices;

/// Collects the notices of a test.
struct notice_collector {
  notice_collector() {
    notices.clear();
    set_notice_handler([](const std::string& text) { notices.push_back(text); });
  }
  notice_collector(const notice_collector&) = delete;
  notice_collector& operator=(const notice_collector&) = delete;
  ~notice_collector() { set_notice_handler(nullptr); }
};

using names = std::vector<std::string>;

names names_of(const fs::path& directory) {
  names all;
  for (const auto& e : fs::directory_iterator(directory)) {
    all.push_back(e.path().filename().string());
  }
  std::sort(all.begin(), all.end());
  return all;
}

}  // namespace

TEST_CASE("atomic_directory: a new destination appears with commit, or nothing stays", "[io]") {
  const temporary_directory dir;
  {
    atomic_directory out(dir / "a/b/out");
    CHECK(out.partial() == dir / "a/b/out.unfinished.partial");
    CHECK_FALSE(out.resumed());
    write_text_file(out.partial() / "config.json", "{}");
    CHECK(names_of(dir / "a/b") == names{"out.unfinished.partial"});
    out.commit();
    CHECK(names_of(dir / "a/b") == names{"out"});
  }
  CHECK(read_all(dir / "a/b/out/config.json") == "{}");
  {
    const atomic_directory out(dir / "c/d/out/");
    write_text_file(out.partial() / "config.json", "{}");
    write_text_file(dir / "c/other", "of somebody else");
  }
  CHECK(names_of(dir / "c") == names{"other"});  // d was created for it, c holds more
  { const atomic_directory out(dir / "e/f/out"); }
  CHECK(dir.files() == names{"a", "c"});
}

TEST_CASE("atomic_directory refuses a destination that is taken, before any work", "[io]") {
  const temporary_directory dir;
  fs::create_directory(dir / "full");
  write_all(dir / "full/file", "x");
  write_all(dir / "file", "x");
  fs::create_directory_symlink(dir / "full", dir / "link");
  fs::create_directory_symlink(dir / "nowhere", dir / "dangling");
  const names before = dir.files();
  const auto refusal = [&](const std::string& name) {
    const caught e = catch_error([&] { atomic_directory out(dir / name); });
    CHECK(e.code == errc::io_error);
    CHECK(dir.files() == before);
    return e.message;
  };
  for (const char* name : {"full", "full/", "file", "link", "dangling"}) {
    INFO(name);
    CHECK_THAT(refusal(name), contains("must not exist yet, or be empty"));
  }
  CHECK_THAT(catch_error([] { atomic_directory out(""); }).message, contains("directory ''"));
  CHECK_THAT(catch_error([] { atomic_directory out("/"); }).message, contains("must not exist"));
  CHECK_THAT(refusal("file/out"), contains("Not a directory"));
  CHECK_THAT(refusal("new/" + std::string(300, 'x')), contains("File name too long"));
  CHECK_THAT(refusal("new/" + std::string(250, 'x')), contains("File name too long"));
  CHECK(names_of(dir / "full") == names{"file"});
}

TEST_CASE("atomic_directory writes into an empty directory, also through a link", "[io]") {
  const temporary_directory dir;
  fs::create_directory(dir / "out");
  fs::create_directory(dir / "out/lost+found");  // as of a fresh volume
  fs::create_directory_symlink("out", dir / "link");
  fs::permissions(dir / "out", fs::perms::owner_all);
  { const atomic_directory out(dir / "link"); }
  CHECK(names_of(dir / "out") == names{"lost+found"});
  atomic_directory out(dir / "link");
  CHECK(out.partial() == dir / "link/unfinished.partial");
  write_text_file(out.partial() / "config.json", "{}");
  fs::create_directory(out.partial() / "deep");
  write_text_file(out.partial() / "deep/file", "x");
  CHECK(names_of(dir / "out") == names{"lost+found", "unfinished.partial"});
  out.commit();
  CHECK(names_of(dir / "out") == names{"config.json", "deep", "lost+found"});
  CHECK(fs::status(dir / "out").permissions() == fs::perms::owner_all);
  CHECK(fs::is_symlink(dir / "link"));
  CHECK(dir.files() == names{"link", "out"});
}

TEST_CASE("a finished result stays, and the error says where, when it cannot be moved", "[io]") {
  const temporary_directory dir;
  const notice_collector collector;
  for (const bool exists : {false, true}) {
    INFO(exists);
    const fs::path path = dir / (exists ? "old" : "new");
    if (exists) fs::create_directory(path);
    for (int run = 0; run < 2; ++run) {
      std::string message;
      {
        atomic_directory out(path);
        write_text_file(out.partial() / "config.json", std::to_string(run));
        fs::create_directory(path);
        write_all(path / "config.json", "of somebody else");
        message = catch_error([&] { out.commit(); }).message;
      }
      const std::string aside =
          "finished-" + std::to_string(exists ? 0 : run) + std::string(".partial");
      const fs::path kept = exists ? path / aside : dir / ("new." + aside);
      CHECK_THAT(message, contains("it is complete in " + kept.string()));
      CHECK(read_all(path / "config.json") == "of somebody else");
      // The next run leaves it alone.
      fs::remove(path / "config.json");
      if (exists) {
        CHECK(catch_error([&] { atomic_directory out(path); }).code == errc::io_error);
        fs::rename(kept, dir / ("old.finished-" + std::to_string(run) + ".partial"));
      } else {
        fs::remove(path);
        const atomic_directory out(path);
      }
    }
  }
  CHECK(dir.files() == names{"new.finished-0.partial", "new.finished-1.partial", "old",
                             "old.finished-0.partial", "old.finished-1.partial"});
  CHECK(read_all(dir / "new.finished-1.partial/config.json") == "1");
  CHECK(notices.empty());
}

TEST_CASE("of two runs to one destination the second is refused", "[io]") {
  const temporary_directory dir;
  fs::create_directory(dir / "old");
  for (const char* name : {"old", "new"}) {
    INFO(name);
    const atomic_directory first(dir / name);
    write_text_file(first.partial() / "config.json", "{}");
    const caught e = catch_error([&] { atomic_directory second(dir / name); });
    CHECK(e.code == errc::io_error);
    CHECK_THAT(e.message, contains("another run is writing it"));
    CHECK(fs::exists(first.partial() / "config.json"));
    const atomic_directory other(dir / (std::string(name) + "er"));
  }
  CHECK(dir.files() == names{"old"});
  // The destination was created after the first run had started.
  const atomic_directory first(dir / "new");
  fs::create_directory(dir / "new");
  CHECK_THAT(catch_error([&] { atomic_directory second(dir / "new"); }).message,
             contains("another run is writing it"));
}

TEST_CASE("what a killed run left is removed, or reused, and nothing else is touched", "[io]") {
  const temporary_directory dir;
  const notice_collector collector;
  const auto leave = [&](const fs::path& partial) {  // no process holds its lock
    fs::create_directories(partial);
    write_all(partial / "layer-3.safetensors", "x");
    write_all(partial / "config.json.unfinished-0.tmp", "x");
  };
  leave(dir / "out.unfinished.partial");
  leave(dir / "out.12-0.partial");
  leave(dir / "other.unfinished.partial");
  leave(dir / "out2.12-0.partial");
  leave(dir / "out.mine.partial");
  const names others = {"other.unfinished.partial", "out.12-0.partial", "out.mine.partial",
                        "out2.12-0.partial"};
  {
    const atomic_directory out(dir / "out");
    CHECK_FALSE(out.resumed());
    CHECK(fs::is_empty(out.partial()));
  }
  CHECK(dir.files() == others);
  REQUIRE(notices.size() == 2);
  CHECK_THAT(notices[0], contains("out.12-0.partial was left by a run of an earlier version"));
  CHECK_THAT(notices[1], contains("removed what an interrupted run left in " +
                                  (dir / "out.unfinished.partial").string()));

  leave(dir / "out.unfinished.partial");
  {
    atomic_directory out(dir / "out", leftovers::reuse);
    CHECK(out.resumed());
    CHECK(names_of(out.partial()) == names{"layer-3.safetensors"});
    out.keep();
  }
  CHECK(fs::exists(dir / "out.unfinished.partial/layer-3.safetensors"));
  {
    atomic_directory out(dir / "out", leftovers::reuse);
    CHECK(out.resumed());
    out.keep();
    out.clear();
    CHECK_FALSE(out.resumed());
    CHECK(fs::is_empty(out.partial()));
    out.keep(false);
  }
  CHECK(dir.files() == others);

  // The destination was created in between: what is left moves into it.
  leave(dir / "out.unfinished.partial");
  fs::create_directory(dir / "out");
  {
    atomic_directory out(dir / "out", leftovers::reuse);
    CHECK(out.resumed());
    CHECK(names_of(out.partial()) == names{"layer-3.safetensors"});
    CHECK_FALSE(fs::exists(dir / "out.unfinished.partial"));
    out.commit();
  }
  CHECK(names_of(dir / "out") == names{"layer-3.safetensors"});
}

TEST_CASE("a link in the place of a leftover is not followed", "[io]") {
  const temporary_directory dir;
  fs::create_directory(dir / "precious");
  write_all(dir / "precious/file", "x");
  fs::create_directory_symlink(dir / "precious", dir / "out.unfinished.partial");
  CHECK_THAT(catch_error([&] { atomic_directory out(dir / "out"); }).message,
             contains("cannot be locked"));
  CHECK(fs::exists(dir / "precious/file"));
}

TEST_CASE("atomic_file removes what killed processes left of its destination only", "[io]") {
  const temporary_directory dir;
  const notice_collector collector;
  write_all(dir / "a.unfinished-0.tmp", "x");
  write_all(dir / "a.unfinished-7.tmp", "x");
  write_all(dir / "a.unfinished-x.tmp", "x");
  write_all(dir / "b.unfinished-0.tmp", "x");
  write_text_file(dir / "a", "y");
  CHECK(dir.files() == names{"a", "a.unfinished-x.tmp", "b.unfinished-0.tmp"});
  CHECK(notices.size() == 2);

  // Two writers of one file, both alive: whole files, the last one stays.
  {
    atomic_file first(dir / "c");
    atomic_file second(dir / "c");
    first.write("first");
    second.write("second");
    second.commit();
    first.commit();
    const atomic_file given_up(dir / "c");
  }
  CHECK(read_all(dir / "c") == "first");
  CHECK(dir.files() == names{"a", "a.unfinished-x.tmp", "b.unfinished-0.tmp", "c"});
  CHECK(notices.size() == 2);
}
