// SPDX-License-Identifier: Apache-2.0
// The arguments of decode_attention, which has a kernel on the CPU alone; plain data, as in args.h.
#pragma once

#include <cstdint>

namespace rlhf_fast {

struct DecodeAttentionArgs {
  const void* query;  // (B, key_heads * shared, size), dense
  const void* key;    // (B, key_heads, length, size), strides in elements; the last is 1
  const void* value;  // (B, key_heads, length, value_size)
  const bool* mask;   // rows of `length`, false at keys that are not seen; or null
  int64_t key_strides[3];
  int64_t value_strides[3];
  int64_t mask_stride;
  int64_t key_heads;
  int64_t shared;  // query heads of a key head
  int64_t length;
  int64_t size;
  int64_t value_size;
  float scale;
  void* output;  // (B, key_heads * shared, value_size), dense
};

}  // namespace rlhf_fast
