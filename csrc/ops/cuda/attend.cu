// attend: one kernel for each type and width there is.

#include <stdexcept>
#include <string>

#include "ops/cuda/attend_launch.h"

namespace aegaeon::ops::cuda {
namespace {

template <typename T>
void attend_with(Stream stream, const DeviceTables& tables, const AttendParams& params) {
  switch (params.kv.head_dim) {
    case 64:
      return attend_as<T, 64>(stream, tables, params);
    case 96:
      return attend_as<T, 96>(stream, tables, params);
    case 128:
      return attend_as<T, 128>(stream, tables, params);
    case 256:
      return attend_as<T, 256>(stream, tables, params);
    default:
      throw std::invalid_argument("no kernel attends with a head_dim of " +
                                  std::to_string(params.kv.head_dim) +
                                  "; there are 64, 96, 128 and 256");
  }
}

}  // namespace

void attend(Stream stream, const DeviceTables& tables, const AttendParams& params) {
  switch (params.kv.type) {
    case KvType::f32:
      return attend_with<float>(stream, tables, params);
    case KvType::bf16:
      return attend_with<Bf16>(stream, tables, params);
    case KvType::f16:
      return attend_with<F16>(stream, tables, params);
  }
}

}  // namespace aegaeon::ops::cuda
