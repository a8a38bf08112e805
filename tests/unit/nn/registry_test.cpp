// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "capstan/base/error.h"
#include "capstan/nn/model.h"

namespace capstan::nn {
namespace {

Param no_param(const std::string&) { return {}; }

TEST(Builders, OwnFamiliesAreFoundByName) {
  register_builder("empty",
                   [](const plan::ModelShape& shape, const ModelOptions&, const FindParam&) {
                     Model model;
                     model.shape = shape;
                     return model;
                   });
  plan::ModelShape shape;
  shape.family = "empty";
  shape.vocab_size = 5;
  EXPECT_EQ(build_model(shape, {at::kFloat, at::kFloat}, no_param).shape.vocab_size, 5);
}

TEST(Builders, UnknownFamilyNamesTheKnownOnes) {
  plan::ModelShape shape;
  shape.family = "lama";
  try {
    (void)build_model(shape, {at::kFloat, at::kFloat}, no_param);
    FAIL() << "no error";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("'lama'"));
    EXPECT_THAT(error.what(), ::testing::HasSubstr("llama"));
  }
}

TEST(Builders, LlamaRefusesOtherActivations) {
  plan::ModelShape shape;
  shape.hidden_act = "gelu";
  shape.head_dim = 8;
  EXPECT_THROW((void)build_model(shape, {at::kFloat, at::kFloat}, no_param), ConfigError);
}

}  // namespace
}  // namespace capstan::nn
