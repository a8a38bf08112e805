// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/records.h"

#include <string_view>
#include <type_traits>

#include "capstan/base/env.h"
#include "capstan/base/json.h"

namespace capstan::metrics {

namespace {

// One JSON object with its keys in the order of the calls.
class Line {
 public:
  explicit Line(std::string_view kind) { add("kind", kind); }
  Line& add(std::string_view key, std::string_view value) {
    // Log texts may hold any bytes; a line that is not UTF-8 would be unreadable as a whole.
    const json::Json text = std::string(value);
    return raw(key, text.dump(-1, ' ', false, json::Json::error_handler_t::replace));
  }
  Line& add(std::string_view key, const std::string& value) {
    return add(key, std::string_view(value));
  }
  Line& add(std::string_view key, const char* value) { return add(key, std::string_view(value)); }
  Line& add(std::string_view key, double value) { return raw(key, json::number(value)); }
  Line& add(std::string_view key, int64_t value) { return raw(key, std::to_string(value)); }
  Line& add(std::string_view key, int value) { return raw(key, std::to_string(value)); }
  Line& add(std::string_view key, bool value) { return raw(key, value ? "true" : "false"); }
  template <class T>
  Line& add(std::string_view key, const std::optional<T>& value) {
    return value ? add(key, *value) : raw(key, "null");
  }
  [[nodiscard]] std::string done() { return out_ + "}"; }

 private:
  Line& raw(std::string_view key, std::string_view value) {
    out_ += out_.empty() ? "{\"" : ",\"";
    out_ += key;
    out_ += "\":";
    out_ += value;
    return *this;
  }
  std::string out_;
};

std::string time_or_now(const std::string& time) { return time.empty() ? utc_now() : time; }

}  // namespace

std::string to_json(const StartRecord& record) {
  return Line("start")
      .add("schema", kSchemaVersion)
      .add("time", time_or_now(record.time))
      .add("attempt", record.attempt)
      .add("run", record.run)
      .add("version", record.version)
      .add("world_size", record.world_size)
      .add("device", record.device)
      .add("recipe_xxh3", record.recipe_xxh3)
      .add("parameters", record.parameters)
      .add("flops_per_token", record.flops_per_token)
      .add("flops_convention", record.flops_convention)
      .add("predicted_peak_bytes", record.predicted_peak_bytes)
      .add("resumed_step", record.resumed_step)
      .done();
}

std::string to_json(const StepRecord& record) {
  Line line("step");
  line.add("attempt", record.attempt)
      .add("step", record.step)
      .add("tokens", record.tokens)
      .add("samples", record.samples)
      .add("loss", record.loss)
      .add("grad_norm", record.grad_norm)
      .add("lr", record.lr)
      .add("step_ms", record.step_ms)
      .add("data_wait_ms", record.data_wait_ms)
      .add("tokens_per_s", record.tokens_per_s)
      .add("mfu", record.mfu)
      .add("peak_bytes", record.peak_bytes)
      .add("rss_bytes", record.rss_bytes)
      .add("target_tokens", record.target_tokens)
      .add("skipped", record.skipped)
      .add("loss_scale", record.loss_scale);
  if (record.experts)
    line.add("expert_load", record.experts->load)
        .add("expert_dropped", record.experts->dropped)
        .add("expert_auxiliary_loss", record.experts->auxiliary_loss)
        .add("expert_z_loss", record.experts->z_loss);
  return line.add("elapsed_s", record.elapsed_s).done();
}

std::string to_json(const EvalRecord& record) {
  return Line("eval")
      .add("attempt", record.attempt)
      .add("step", record.step)
      .add("set", record.set)
      .add("loss", record.loss)
      .add("perplexity", record.perplexity)
      .add("bits_per_byte", record.bits_per_byte)
      .add("target_tokens", record.target_tokens)
      .done();
}

std::string to_json(const CheckpointRecord& record) {
  return Line("checkpoint")
      .add("attempt", record.attempt)
      .add("step", record.step)
      .add("path", record.path)
      .add("bytes", record.bytes)
      .add("stall_ms", record.stall_ms)
      .add("commit_ms", record.commit_ms)
      .add("ok", record.ok)
      .add("error", record.error)
      .done();
}

std::string to_json(const EventRecord& record) {
  return Line("event")
      .add("attempt", record.attempt)
      .add("step", record.step)
      .add("level", record.level)
      .add("module", record.module)
      .add("text", record.text)
      .done();
}

std::string to_json(const EndRecord& record) {
  return Line("end")
      .add("time", time_or_now(record.time))
      .add("attempt", record.attempt)
      .add("step", record.step)
      .add("exit", record.exit)
      .add("cause", record.cause)
      .done();
}

}  // namespace capstan::metrics
