// SPDX-License-Identifier: Apache-2.0
// JSON as people's files have it: strict, but for what Python's json module writes.
#include "qeft/io/json.hpp"

#include "qeft/io/json_fields.hpp"
#include "support/catch.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft;
using namespace qeft::io;
using namespace qeft_test;
using nlohmann::json;

namespace {

std::string refusal(const std::string& text) {
  const caught e = catch_error([&] { parse_json(text, "file"); });
  CHECK(e.code == errc::corrupt_file);
  return e.message;
}

}  // namespace

TEST_CASE("parse_json reads what nlohmann's parser reads", "[io]") {
  for (const char* text :
       {R"({"a":[1,-2,3.5,"x",true,false,null,{"b":{}},[[]],18446744073709551615],"":""})", "[]",
        "5", "\"x\"", R"(["\ud83d\ude00 \u00e9 \\ud800 \" NaN Infinity"])", " [ 1 , 2 ] ", "-7",
        "-0.5"}) {
    INFO(text);
    CHECK(parse_json(text, "file") == json::parse(text));
    CHECK(dump_json(json::parse(text)) == json::parse(text).dump());
  }
}

TEST_CASE("parse_json refuses what is not JSON, and names the file", "[io]") {
  for (const char* text : {"", "{", "{\"a\":1}x", "[1,]", "{1:2}", "{\"a\" 1}", "nan", "[NaNx]",
                           "+Infinity", "[-NaN]", "[--Infinity]", "\"\xff\"", "{\"a\":1,}",
                           "[1 NaN]", "{NaN:1}", "\"\\ud8\"", "\"\\u12g4\"", "[\"\\", "1e999"}) {
    INFO(text);
    CHECK_THAT(refusal(text), contains("file: not valid JSON"));
  }
  CHECK_THAT(refusal(R"({"b":{"a":1,"a":2}})"), contains("the key 'a' appears twice"));
  const auto nested = [](int depth) {
    const auto n = static_cast<std::size_t>(depth);
    return std::string(n, '[') + std::string(n, ']');
  };
  CHECK(parse_json(nested(64), "file").is_array());
  CHECK_THAT(refusal(nested(65)), contains("nested deeper than 64"));
  CHECK_THAT(refusal(std::string(1000000, '[')), contains("nested deeper than 64"));
  std::string objects;
  for (int i = 0; i < 65; ++i) objects += "{\"a\":";
  CHECK_THAT(refusal(objects), contains("nested deeper than 64"));
}

TEST_CASE("Python's literals and lone surrogates are read, written again, and refused by readers",
          "[io]") {
  const std::string text =
      R"({"a":NaN,"b":[Infinity,-Infinity,"-Infinity"],"c":"x\ud800y","d":"\udc00\ud83d\ud83d\ude00","\uDBFF":1})";
  const json value = parse_json(text, "file");
  CHECK(std::isnan(value.at("a").get<double>()));
  CHECK(value.at("b")[0].get<double>() == std::numeric_limits<double>::infinity());
  CHECK(value.at("b")[1].get<double>() == -std::numeric_limits<double>::infinity());
  CHECK(value.at("b")[2] == "-Infinity");
  CHECK(has_lone_surrogate(value.at("c").get<std::string>()));
  CHECK_FALSE(has_lone_surrogate("x"));
  CHECK(parse_json(dump_json(value), "file").at("d") == value.at("d"));
  CHECK_THAT(dump_json(value), contains(R"("c":"x\ud800y")"));
  CHECK_THAT(dump_json(value), contains(R"("\udc00\ud83d)"
                                        "\xF0\x9F\x98\x80\""));
  CHECK_THAT(dump_json(value), contains(R"("a":NaN,"b":[Infinity,-Infinity,"-Infinity"])"));
  CHECK_THAT(dump_json(value), contains(R"("\uDBFF":1)"));
  CHECK(catch_error([] { dump_json("\xff"); }).code == errc::invalid_argument);

  const json_fields fields(value, "file");
  const auto read = [&](auto&& action) {
    const caught e = catch_error(action);
    CHECK(e.code == errc::corrupt_file);
    return e.message;
  };
  CHECK_THAT(read([&] { fields.integer("a", 0, 9); }), contains("file: a is NaN, but must be"));
  CHECK_THAT(read([&] { fields.positive("a"); }), contains("a is NaN"));
  CHECK_THAT(read([&] { fields.boolean_or("a", true); }), contains("a is NaN"));
  CHECK_THAT(read([&] { fields.text("a"); }), contains("a is NaN"));
  CHECK_THAT(read([&] { fields.text_or("c", ""); }),
             contains(R"(c is "x\ud800y", but must be text)"));
  const json infinite = parse_json(R"({"a":Infinity})", "file");
  CHECK_THAT(read([&] { json_fields(infinite, "file").positive_or("a", 1); }),
             contains("a is Infinity"));
}
