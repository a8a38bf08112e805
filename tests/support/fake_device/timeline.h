// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Streams and events as vector clocks: a stream knows, of every stream, the last op it is ordered
// behind. Functions take state_mutex() themselves unless they say otherwise.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

namespace capstan::test::fake {

// Guards streams, blocks and pending copies. Recursive: freeing a tensor may happen anywhere.
std::recursive_mutex& state_mutex();

using Clock = std::vector<uint64_t>;  // by stream: how many of its ops

// One op's place in time.
struct Access {
  int stream = 0;
  uint64_t tick = 0;
  const char* op = "";
};

struct EventState {
  Clock clock;
  bool was_polled = false;  // the first poll after a record finds it pending, the next one done
};

int create_stream();
int current_stream();  // the calling thread's
void set_current_stream(int stream);

Access begin_op(const char* op);  // on the current stream
Access last_op(int stream, const char* op);
// Whether work queued on `stream` from here on runs after `earlier`.
bool is_ordered(const Access& earlier, int stream);
// Whether the host has waited for it.
bool is_done(const Access& access);

void record(EventState& event, int stream);
void wait(int stream, const EventState& event);
bool poll(EventState& event);
void synchronize(const EventState& event);  // both count as host waits
void synchronize_stream(int stream, const char* reason = "synchronize(stream)");
void synchronize_device();
void count_host_sync(const char* reason);  // a literal; without effect on the clocks

}  // namespace capstan::test::fake
