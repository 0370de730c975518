// SPDX-License-Identifier: Apache-2.0
// config.json of Llama-family models: every accepted spelling, every broken rule, and the weights.
#include "config.hpp"

#include <functional>

#include "hf_model.hpp"
#include "support/catch.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;

namespace {

json smollm2() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": null, "attention_bias": false,
    "tie_word_embeddings": true, "vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": -1, "torch_dtype": "bfloat16"})");
}

/// SmolLM2's config with these keys replaced.
json with(const json& changes, json config = smollm2()) {
  config.update(changes);
  return config;
}
json without(const std::string& key) {
  json config = smollm2();
  config.erase(key);
  return config;
}

model_config parse(const json& config) { return parse_config(config, "config.json"); }

const json llama3_rope = {{"rope_type", "llama3"},
                          {"factor", 32.0},
                          {"low_freq_factor", 1.0},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings", 8192}};

}  // namespace

TEST_CASE("the config of SmolLM2", "[llm]") {
  const model_config c = parse(smollm2());
  CHECK(c.model_type == "llama");
  CHECK(c.hidden_size == 576);
  CHECK(c.intermediate_size == 1536);
  CHECK(c.num_hidden_layers == 30);
  CHECK(c.num_attention_heads == 9);
  CHECK(c.num_key_value_heads == 3);
  CHECK(c.head_dim == 64);
  CHECK(c.vocab_size == 49152);
  CHECK(c.max_position_embeddings == 8192);
  CHECK(c.sliding_window == 0);
  CHECK(c.rms_norm_eps == 1e-5);
  CHECK(c.rope.theta == 100000);
  CHECK(c.rope.scaling == rope_scaling::none);
  CHECK(c.tie_word_embeddings);
  CHECK_FALSE(c.qkv_bias);
  CHECK_FALSE(c.o_bias);
  CHECK_FALSE(c.mlp_bias);
  CHECK(c.eos_token_ids == std::vector<int>{2});
  CHECK_FALSE(c.quantization.has_value());
  CHECK(c.source == smollm2());
}

TEST_CASE("absent keys have the values Hugging Face gives them", "[llm]") {
  CHECK(parse(without("num_key_value_heads")).num_key_value_heads == 9);
  CHECK(parse(without("rms_norm_eps")).rms_norm_eps == 1e-6);
  CHECK(parse(without("rope_theta")).rope.theta == 10000);
  CHECK(parse(without("max_position_embeddings")).max_position_embeddings == 2048);
  CHECK_FALSE(parse(without("tie_word_embeddings")).tie_word_embeddings);
  CHECK(parse(without("hidden_act")).hidden_size == 576);
  CHECK(parse(without("eos_token_id")).eos_token_ids == std::vector<int>{2});
  CHECK(parse(with({{"eos_token_id", nullptr}})).eos_token_ids.empty());
  CHECK(parse(with({{"num_key_value_heads", nullptr}})).num_key_value_heads == 9);
  CHECK(parse(with({{"hidden_act", "swish"}})).hidden_size == 576);
  CHECK(parse(with({{"head_dim", nullptr}})).head_dim == 64);
  CHECK(parse(with({{"head_dim", 80}})).head_dim == 80);
}

TEST_CASE("rotary scaling in its spellings", "[llm]") {
  json old_spelling = llama3_rope;
  old_spelling.erase("rope_type");
  old_spelling["type"] = "llama3";
  json new_spelling = llama3_rope;
  new_spelling["rope_theta"] = 500000;
  for (const json& config : {with({{"rope_scaling", llama3_rope}, {"rope_theta", 500000}}),
                             with({{"rope_scaling", old_spelling}, {"rope_theta", 500000}}),
                             with({{"rope_parameters", new_spelling}, {"rope_theta", nullptr}})}) {
    const rope_config rope = parse(config).rope;
    CHECK(rope.theta == 500000);
    CHECK(rope.scaling == rope_scaling::llama3);
    CHECK(rope.factor == 32);
    CHECK(rope.low_freq_factor == 1);
    CHECK(rope.high_freq_factor == 4);
    CHECK(rope.original_max_position_embeddings == 8192);
  }
  const rope_config linear =
      parse(with({{"rope_scaling", {{"type", "linear"}, {"factor", 2.5}}}})).rope;
  CHECK(linear.scaling == rope_scaling::linear);
  CHECK(linear.factor == 2.5);
  const rope_config plain =
      parse(with({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 7.0}}}})).rope;
  CHECK(plain.scaling == rope_scaling::none);
  CHECK(plain.theta == 7);
  const json dynamic = {{"type", "dynamic"}, {"factor", 2.0}};
  CHECK(parse(with({{"rope_scaling", dynamic}})).rope.scaling == rope_scaling::none);
  const rope_config bare = parse(with({{"rope_parameters", {{"rope_theta", 5e4}}}})).rope;
  CHECK(bare.scaling == rope_scaling::none);
  CHECK(bare.theta == 5e4);
  json without_context = with({{"rope_scaling", llama3_rope}});
  without_context["rope_scaling"].erase("original_max_position_embeddings");
  CHECK(parse(without_context).rope.original_max_position_embeddings == 8192);
  // Both spellings of the type in one object: the new one counts.
  const rope_config both_types =
      parse(with({{"rope_scaling", {{"type", "yarn"}, {"rope_type", "linear"}, {"factor", 2}}}}))
          .rope;
  CHECK(both_types.scaling == rope_scaling::linear);
}

TEST_CASE("rope_scaling counts beside rope_parameters, of which then nothing is left", "[llm]") {
  const json linear = {{"type", "linear"}, {"factor", 4.0}};
  const json plain = {{"rope_type", "default"}, {"rope_theta", 7.0}};
  json both = with({{"rope_scaling", linear}, {"rope_parameters", plain}});
  CHECK(parse(both).rope.scaling == rope_scaling::linear);
  CHECK(parse(both).rope.factor == 4);
  CHECK(parse(both).rope.theta == 100000);  // that beside them
  both.erase("rope_theta");
  CHECK(parse(both).rope.theta == 10000);
  both["rope_scaling"]["rope_theta"] = 9;
  CHECK(parse(both).rope.theta == 9);
  // Empty or null ones do not.
  for (const json& none : {json::object(), json(nullptr)}) {
    const rope_config rope = parse(with({{"rope_scaling", none}, {"rope_parameters", plain}})).rope;
    CHECK(rope.scaling == rope_scaling::none);
    CHECK(rope.theta == 7);
  }
  CHECK(parse(with({{"rope_scaling", json::object()}})).rope.theta == 100000);
}

TEST_CASE("Mistral and Qwen2", "[llm]") {
  const json mistral = with({{"model_type", "mistral"}, {"max_position_embeddings", 32768}});
  CHECK(parse(with({{"sliding_window", 4096}}, mistral)).sliding_window == 4096);
  CHECK(parse(with({{"sliding_window", nullptr}}, mistral)).sliding_window == 0);
  CHECK(parse(with({{"sliding_window", 32768}}, mistral)).sliding_window == 0);
  CHECK(parse(mistral).sliding_window == 4096);
  CHECK_FALSE(parse(mistral).qkv_bias);

  CHECK(parse(with({{"num_key_value_heads", nullptr}}, mistral)).num_key_value_heads == 9);

  const json qwen2 = with({{"model_type", "qwen2"},
                           {"sliding_window", 4096},
                           {"use_sliding_window", false},
                           {"max_window_layers", 21}});
  const model_config c = parse(qwen2);
  CHECK(c.sliding_window == 0);
  CHECK(c.qkv_bias);
  CHECK_FALSE(c.o_bias);
  CHECK_FALSE(c.mlp_bias);
  json bare = qwen2;
  bare.erase("eos_token_id");
  bare.erase("max_position_embeddings");
  CHECK(parse(bare).eos_token_ids.empty());
  CHECK(parse(bare).max_position_embeddings == 32768);
  bare["model_type"] = "mistral";
  CHECK(parse(bare).eos_token_ids == std::vector<int>{2});
  CHECK(parse(bare).max_position_embeddings == 131072);
}

TEST_CASE("which layers of a Qwen2 have a window", "[llm]") {
  const auto windows = [](const json& changes) {
    json config = with({{"model_type", "qwen2"},
                        {"num_hidden_layers", 4},
                        {"sliding_window", 16},
                        {"use_sliding_window", true},
                        {"max_window_layers", 3}});
    config.update(changes);
    const model_config c = parse(config);
    std::vector<index_t> all;
    for (index_t l = 0; l < 4; ++l) all.push_back(c.window_of(l));
    return all;
  };
  using list = std::vector<index_t>;
  CHECK(windows(json::object()) == list{0, 0, 0, 16});
  CHECK(windows({{"max_window_layers", 0}}) == list{16, 16, 16, 16});
  CHECK(windows({{"max_window_layers", 4}}) == list{0, 0, 0, 0});
  CHECK(windows({{"max_window_layers", nullptr}}) == list{0, 0, 0, 0});  // 28
  CHECK(windows({{"use_sliding_window", false}}) == list{0, 0, 0, 0});
  CHECK(windows({{"sliding_window", nullptr}}) == list{0, 0, 0, 0});
  CHECK(windows({{"sliding_window", 8192}}) == list{0, 0, 0, 0});  // of 8192 positions
  const json types = {"sliding_attention", "full_attention", "full_attention", "sliding_attention"};
  CHECK(windows({{"layer_types", types}}) == list{16, 0, 0, 16});
  CHECK_THAT(catch_error([&] {
               windows({{"layer_types", types}, {"use_sliding_window", false}});
             }).message,
             contains("layer_types"));
  CHECK_THAT(catch_error([&] {
               windows({{"layer_types", {"full_attention"}}});
             }).message,
             contains("a list of num_hidden_layers = 4 types"));
  json other = types;
  other[1] = "linear_attention";
  CHECK(catch_error([&] { windows({{"layer_types", other}}); }).code == errc::unsupported);
}

TEST_CASE("biases of a Llama", "[llm]") {
  const model_config biased = parse(with({{"attention_bias", true}, {"mlp_bias", true}}));
  CHECK((biased.qkv_bias && biased.o_bias && biased.mlp_bias));
}

TEST_CASE("what breaks a rule is refused by key, value and rule", "[llm]") {
  struct bad_case {
    json config;
    std::string message;
  };
  const auto llama3_with = [](const json& changes) {
    return with({{"rope_scaling", with(changes, llama3_rope)}});
  };
  const std::vector<bad_case> broken = {
      {json::array(), "must be an object"},
      {without("model_type"), "model_type is missing, but must be a string"},
      {without("hidden_size"), "hidden_size is missing, but must be an integer"},
      {without("intermediate_size"), "intermediate_size is missing"},
      {without("num_hidden_layers"), "num_hidden_layers is missing"},
      {without("num_attention_heads"), "num_attention_heads is missing"},
      {without("vocab_size"), "vocab_size is missing"},
      {with({{"hidden_size", -576}}), "hidden_size is -576"},
      {with({{"hidden_size", "576"}}), "hidden_size is \"576\""},
      {with({{"hidden_size", 576.5}}), "hidden_size is 576.5"},
      {with({{"hidden_size", 18446744073709551615U}}), "hidden_size is 18446744073709551615"},
      {with({{"num_hidden_layers", 0}}), "num_hidden_layers is 0"},
      {with({{"num_attention_heads", 7}, {"num_key_value_heads", 7}}),
       "num_attention_heads is 7, but must be a divisor of "
       "hidden_size = 576"},
      {with({{"num_key_value_heads", 4}}),
       "num_key_value_heads is 4, but must be a divisor of "
       "num_attention_heads = 9"},
      {with({{"model_type", "mistral"}}, without("num_key_value_heads")),
       "num_key_value_heads is missing, which means 8 for mistral, but must be a divisor of"},
      {with({{"head_dim", 63}}), "head_dim is 63, but must be even"},
      {with({{"max_position_embeddings", 0}}), "max_position_embeddings is 0"},
      {with({{"rms_norm_eps", 0}}), "rms_norm_eps is 0, but must be a number above 0"},
      {with({{"rms_norm_eps", "1e-5"}}), "rms_norm_eps is \"1e-5\""},
      {with({{"rope_theta", -1.0}}), "rope_theta is -1.0"},
      {with({{"rope_scaling", 3}}), "rope_scaling: must be an object"},
      {with({{"rope_theta", nullptr}}), "rope_theta is missing"},
      {with({{"rope_parameters", {{"rope_theta", "1e4"}}}}), "rope_theta is \"1e4\""},
      {with({{"rope_scaling", {{"rope_type", nullptr}}}}), "rope_type is missing"},
      {with({{"rope_scaling", {{"type", "linear"}}}}), "rope_scaling: factor is missing"},
      {with({{"rope_scaling", {{"type", "linear"}, {"factor", 0}}}}), "factor is 0"},
      {llama3_with({{"factor", nullptr}}), "factor is missing"},
      {llama3_with({{"low_freq_factor", 0}}), "low_freq_factor is 0"},
      {llama3_with({{"high_freq_factor", 1.0}}), "high_freq_factor is 1.0"},
      {llama3_with({{"original_max_position_embeddings", 1.5}}),
       "original_max_position_embeddings is 1.5"},
      {with({{"tie_word_embeddings", 1}}), "tie_word_embeddings is 1, but must be true or false"},
      {with({{"attention_bias", "no"}}), "attention_bias is \"no\""},
      {with({{"eos_token_id", {2, "3"}}}), "eos_token_id is [2,\"3\"]"},
      {with({{"model_type", "mistral"}, {"sliding_window", 0}}), "sliding_window is 0"},
      {with({{"quantization_config", 4}}), "quantization_config: must be an object"},
      {with({{"quantization_config", {{"bits", 4}}}}), "quant_method is missing"},
  };
  for (const bad_case& b : broken) {
    const caught e = catch_error([&] { parse(b.config); });
    INFO(b.message);
    CHECK(e.code == errc::corrupt_file);
    CHECK_THAT(e.message, contains("config.json"));
    CHECK_THAT(e.message, contains(b.message));
  }
  const std::vector<bad_case> unsupported = {
      {with({{"model_type", "gemma2"}}), "model_type is \"gemma2\", but only"},
      {with({{"hidden_act", "gelu"}}), "hidden_act is \"gelu\", but only \"silu\""},
      {with({{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4}}}}), "rope_type is \"yarn\""},
      {with({{"rope_scaling", {{"type", "longrope"}, {"factor", 4}}}}), "type is \"longrope\""},
      {with({{"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}}}}),
       "partial_rotary_factor is 0.5"},
      {with({{"partial_rotary_factor", 0.5}}), "partial_rotary_factor is 0.5"},
      {with({{"rope_parameters", {{"full_attention", {{"rope_theta", 7.0}}}}}}),
       "full_attention is {\"rope_theta\":7.0}, but only one rotation"},
      {with({{"per_layer_config", {{"0", {{"head_dim", 3}}}}}}), "per_layer_config is"},
      {with({{"quantization_config", {{"quant_method", "gptq"}}}}), "quant_method is \"gptq\""},
  };
  for (const bad_case& b : unsupported) {
    const caught e = catch_error([&] { parse(b.config); });
    INFO(b.message);
    CHECK(e.code == errc::unsupported);
    CHECK_THAT(e.message, contains(b.message));
  }
}

TEST_CASE("the end tokens are those of generation_config.json where it has any", "[llm]") {
  temporary_directory dir;
  CHECK_THAT(catch_error([&] { read_config(dir.path()); }).message, contains("config.json"));
  write_all(dir / "config.json", smollm2().dump());
  const auto ends = [&](const std::string& generation) {
    write_all(dir / "generation_config.json", generation);
    return read_config(dir.path()).eos_token_ids;
  };
  CHECK(read_config(dir.path()).eos_token_ids == std::vector<int>{2});
  CHECK(ends(R"({"bos_token_id": 1, "eos_token_id": [7, 3, 0, 7]})") == std::vector<int>{7, 3, 0});
  CHECK(ends(R"({"bos_token_id": [1, 5]})") == std::vector<int>{2});
  // Ids without a row in the embedding are never drawn; a file that is no JSON is ignored.
  CHECK(ends(R"({"eos_token_id": [50000, 49152, -1, 18446744073709551615, 49151]})") ==
        std::vector<int>{49151});
  CHECK(ends("") == std::vector<int>{2});
  CHECK(ends("{\"eos_token_id\": 5") == std::vector<int>{2});
  CHECK_THAT(catch_error([&] { ends(R"({"eos_token_id": "5"})"); }).message,
             contains("generation_config.json: eos_token_id is \"5\""));
  write_all(dir / "config.json", smollm2().dump().substr(0, 100));
  CHECK(catch_error([&] { read_config(dir.path()); }).code == errc::corrupt_file);
}

TEST_CASE("parse_config keeps the quantisation of a checkpoint", "[llm]") {
  qeft::io::quantization_config q;
  q.layers["model.layers.0.mlp.up_proj"].out_channels = 1536;
  q.layers["model.layers.0.mlp.up_proj"].in_channels = 576;
  const model_config c = parse(with({{"quantization_config", qeft::io::to_json(q)}}));
  REQUIRE(c.quantization.has_value());
  CHECK(c.quantization->layers == q.layers);
}

namespace {

json tiny() {
  return with({{"hidden_size", 8},
               {"intermediate_size", 12},
               {"num_hidden_layers", 2},
               {"num_attention_heads", 4},
               {"num_key_value_heads", 2},
               {"vocab_size", 10},
               {"head_dim", 6}});
}

/// A writer with every tensor of the config, all 1, in this type; `skip` leaves tensors out.
qeft::io::safetensors_writer filled(const model_config& c, qeft::io::dtype type,
                                    const std::function<bool(const std::string&)>& skip) {
  qeft::io::safetensors_writer writer;
  for (const tensor_spec& t : expected_tensors(c)) {
    if (skip(t.name)) continue;
    index_t n = 1;
    for (const index_t s : t.shape) n *= s;
    const std::vector<float> ones(static_cast<std::size_t>(n), 1.0F);
    writer.add(t.name, type, t.shape, qeft::io::to_bytes(type, ones, t.name));
  }
  return writer;
}

}  // namespace

TEST_CASE("expected_tensors follows heads, biases and ties", "[llm]") {
  const auto shape_of = [](const model_config& c, const std::string& name) {
    for (const tensor_spec& t : expected_tensors(c)) {
      if (t.name == name) return t.shape;
    }
    return std::vector<index_t>{};
  };
  const model_config c = parse(tiny());
  CHECK(expected_tensors(c).size() == 1 + 2 * 9 + 1);
  CHECK(shape_of(c, "model.embed_tokens.weight") == std::vector<index_t>{10, 8});
  CHECK(shape_of(c, "model.layers.1.self_attn.q_proj.weight") == std::vector<index_t>{24, 8});
  CHECK(shape_of(c, "model.layers.1.self_attn.k_proj.weight") == std::vector<index_t>{12, 8});
  CHECK(shape_of(c, "model.layers.1.self_attn.o_proj.weight") == std::vector<index_t>{8, 24});
  CHECK(shape_of(c, "model.layers.1.mlp.down_proj.weight") == std::vector<index_t>{8, 12});
  CHECK(shape_of(c, "lm_head.weight").empty());
  CHECK(shape_of(c, "model.layers.0.self_attn.v_proj.bias").empty());

  const model_config qwen =
      parse(with({{"model_type", "qwen2"}, {"tie_word_embeddings", false}}, tiny()));
  CHECK(shape_of(qwen, "lm_head.weight") == std::vector<index_t>{10, 8});
  CHECK(shape_of(qwen, "model.layers.0.self_attn.v_proj.bias") == std::vector<index_t>{12});
  CHECK(shape_of(qwen, "model.layers.0.self_attn.o_proj.bias").empty());
}

TEST_CASE("hf_weights reads every floating type, from one file or shards", "[llm]") {
  const model_config c = parse(tiny());
  using qeft::io::dtype;
  for (const dtype type : {dtype::f16, dtype::bf16, dtype::f32}) {
    for (const index_t shard : {index_t{100}, index_t{1} << 30}) {
      temporary_directory dir;
      filled(c, type, [](const std::string&) { return false; }).write_directory(dir.path(), shard);
      const hf_weights weights(dir.path());
      weights.require(expected_tensors(c));
      CHECK((weights.reader().files().size() > 1) == (shard == 100));
      CHECK(weights.read("model.norm.weight", {8}) == std::vector<float>(8, 1.0F));
      CHECK(weights.view("model.norm.weight", {8}).type == type);
      CHECK_THAT(catch_error([&] { weights.read("model.norm.weight", {9}); }).message,
                 contains("'model.norm.weight' has shape [8], but must have [9]"));
      CHECK_THAT(catch_error([&] { weights.read("absent", {9}); }).message,
                 contains("'absent' is missing"));
    }
  }
}

TEST_CASE("hf_weights finds the tensors of a model that was saved without its head", "[llm]") {
  const model_config c = parse(tiny());
  temporary_directory dir;
  qeft::io::safetensors_writer writer;
  std::vector<tensor_spec> tensors = expected_tensors(c);
  for (const tensor_spec& t : tensors) {
    index_t count = 1;
    for (const index_t n : t.shape) count *= n;
    REQUIRE(t.name.rfind("model.", 0) == 0);
    writer.add(t.name.substr(6), qeft::io::dtype::f32, t.shape,
               std::vector<std::byte>(static_cast<std::size_t>(4 * count)));
  }
  writer.write_directory(dir.path());
  const hf_weights weights(dir.path());
  weights.require(tensors);
  CHECK(weights.read("model.norm.weight", {8}) == std::vector<float>(8, 0.0F));
  tensors.push_back({"lm_head.weight", {4, 8}});
  CHECK_THAT(catch_error([&] { weights.require(tensors); }).message, contains("lm_head.weight"));
}

TEST_CASE("hf_weights lists what is missing and names what is no number", "[llm]") {
  const model_config c = parse(tiny());
  temporary_directory dir;
  auto writer = filled(c, qeft::io::dtype::f32, [](const std::string& name) {
    return name == "model.norm.weight" || name.find("layers.1.mlp") != std::string::npos;
  });
  std::vector<float> values(8, 1.0F);
  values[5] = std::numeric_limits<float>::quiet_NaN();
  writer.add("model.norm.weight", qeft::io::dtype::f32, {8}, qeft::io::as_bytes(values));
  writer.add("model.layers.1.mlp.up_proj.weight", qeft::io::dtype::u8, {12, 8},
             std::vector<std::byte>(96));
  writer.add("model.layers.1.mlp.down_proj.weight", qeft::io::dtype::f16, {12, 8},
             std::vector<std::byte>(192));
  writer.write_directory(dir.path());
  const hf_weights weights(dir.path());
  const caught e = catch_error([&] { weights.require(expected_tensors(c)); });
  CHECK(e.code == errc::corrupt_file);
  CHECK_THAT(e.message, contains("3 tensors are not as config.json says"));
  CHECK_THAT(e.message, contains("model.layers.1.mlp.gate_proj.weight is missing"));
  CHECK_THAT(e.message, contains("model.layers.1.mlp.up_proj.weight is U8"));
  CHECK_THAT(
      e.message,
      contains("model.layers.1.mlp.down_proj.weight has shape [12, 8], but must have [8, 12]"));

  const caught nan = catch_error([&] { weights.read("model.norm.weight", {8}); });
  CHECK(nan.code == errc::not_finite);
  CHECK_THAT(nan.message, contains("'model.norm.weight' holds nan at flat index 5"));

  const model_config big = parse(with({{"num_hidden_layers", 4}}, tiny()));
  CHECK_THAT(catch_error([&] { weights.require(expected_tensors(big)); }).message,
             contains("and 1 more"));
}
