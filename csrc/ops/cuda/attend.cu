// attend: one kernel for each type and width there is.

#include <stdexcept>
#include <string>

#include "ops/cuda/attend_launch.h"

namespace aegaeon::ops::cuda {
namespace {

[[noreturn]] void refuse(std::size_t head_dim) {
  throw std::invalid_argument("no kernel attends with a head_dim of " + std::to_string(head_dim) +
                              "; there are 64, 96, 128 and 256");
}

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
      refuse(params.kv.head_dim);
  }
}

template <typename T>
std::size_t shared_bytes_of(std::size_t head_dim) {
  switch (head_dim) {
    case 64:
      return kAttendShared<T, 64>;
    case 96:
      return kAttendShared<T, 96>;
    case 128:
      return kAttendShared<T, 128>;
    case 256:
      return kAttendShared<T, 256>;
    default:
      refuse(head_dim);
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

std::size_t attend_shared_bytes(KvType type, std::size_t head_dim) {
  switch (type) {
    case KvType::bf16:
      return shared_bytes_of<Bf16>(head_dim);
    case KvType::f16:
      return shared_bytes_of<F16>(head_dim);
    default:
      return shared_bytes_of<float>(head_dim);
  }
}

}  // namespace aegaeon::ops::cuda
