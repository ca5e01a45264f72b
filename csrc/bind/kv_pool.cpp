#include "bind/kv_pool.h"

#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "memory/kv_pool.h"
#include "shm/errors.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using memory::Effort;
using memory::Given;
using memory::KvFound;
using memory::KvGeometry;
using memory::KvKey;
using memory::KvPool;
using memory::Taken;
using Ids = std::vector<std::uint64_t>;
using Shapes = std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>>;

using Found = std::vector<std::tuple<std::uint64_t, std::uint64_t>>;

// Work on so many blocks takes microseconds and is done without the GIL.
constexpr std::size_t kManyBlocks = 256;

KvGeometry geometry_of(std::uint64_t slab_bytes, std::uint64_t slab_count, const Shapes& shapes) {
  KvGeometry geometry{slab_bytes, slab_count, {}};
  for (const auto& [block_bytes, page_bytes, encoding] : shapes) {
    geometry.shapes.push_back({block_bytes, page_bytes, encoding});
  }
  return geometry;
}

std::vector<KvKey> keys_of(const std::vector<py::bytes>& given) {
  std::vector<KvKey> keys;
  keys.reserve(given.size());
  for (const py::bytes& one : given) {
    const auto bytes = static_cast<std::string_view>(one);
    if (bytes.size() != sizeof(KvKey)) {
      throw py::value_error("a key has " + std::to_string(sizeof(KvKey)) + " bytes");
    }
    KvKey key;
    std::memcpy(&key, bytes.data(), sizeof key);
    keys.push_back(key);
  }
  return keys;
}

template <typename Work>
auto run(bool is_long, const Work& work) {
  std::optional<py::gil_scoped_release> released;
  if (is_long) released.emplace();
  return work();
}

// The pool and its words for Python. It stays mapped while a buffer over it lives.
class PyKvPool {
 public:
  explicit PyKvPool(std::unique_ptr<KvPool> pool) : pool_(std::move(pool)) {}

  // A collected pool waits for the lock like a closed one.
  ~PyKvPool() { pool_.reset(); }
  PyKvPool(const PyKvPool&) = delete;
  PyKvPool& operator=(const PyKvPool&) = delete;

  Ids allocate(std::size_t shape, std::size_t count) {
    const unsigned number = check(shape);
    if (count > most_blocks(number)) {
      refuse(number, count, Given::over_quota);
    }
    Ids ids(count);
    Given given = run(count > kManyBlocks,
                      [&] { return pool_->allocate(number, count, ids.data(), Effort::quick); });
    if (given == Given::needs_slab) {
      const py::gil_scoped_release released;
      ++slab_searches_;
      given = pool_->allocate(number, count, ids.data(), Effort::full);
    }
    if (given != Given::all) {
      refuse(number, count, given);
    }
    return ids;
  }

  void free(std::size_t shape, const Ids& ids, bool is_poisoned, std::uint64_t offer) {
    const unsigned number = check(shape);
    // Of an offer somebody may be taking blocks at this moment, which is waited for.
    run(is_poisoned || offer != 0 || ids.size() > kManyBlocks,
        [&] { pool_->free(number, ids, is_poisoned, offer); });
  }

  std::optional<std::uint64_t> offer(std::size_t shape, const Ids& ids) {
    const unsigned number = check(shape);
    const py::gil_scoped_release released;  // an earlier offer of them may be being taken
    return pool_->offer(number, ids);
  }

  bool take(std::size_t shape, const Ids& ids, std::uint64_t sender) {
    const unsigned number = check(shape);
    const Taken taken =
        run(ids.size() > kManyBlocks, [&] { return pool_->take(number, ids, sender); });
    if (taken == Taken::over_quota) {
      refuse(number, ids.size(), Given::over_quota);
    }
    return taken == Taken::all;
  }

  Ids rest(std::size_t shape, const Ids& ids, std::uint64_t offer) {
    const unsigned number = check(shape);
    return run(offer != 0 || ids.size() > kManyBlocks,
               [&] { return pool_->rest(number, ids, offer); });
  }

  std::size_t wake(std::size_t shape, const Ids& ids, const Ids& words) {
    const unsigned number = check(shape, ids, words);
    return run(ids.size() > kManyBlocks, [&] { return pool_->wake(number, ids, words); });
  }

  std::vector<bool> still_rest(std::size_t shape, const Ids& ids, const Ids& words) {
    const unsigned number = check(shape, ids, words);
    return run(ids.size() > kManyBlocks, [&] { return pool_->still_rest(number, ids, words); });
  }

  void tell(std::size_t shape, const std::vector<py::bytes>& given, const Ids& ids,
            const Ids& words) {
    const unsigned number = check(shape, ids, words);
    const std::vector<KvKey> keys = keys_of(given);
    if (keys.size() != ids.size()) {
      throw py::value_error(std::to_string(ids.size()) + " blocks and " +
                            std::to_string(keys.size()) + " keys");
    }
    run(ids.size() > kManyBlocks, [&] { pool_->tell(number, keys, ids, words); });
  }

  Found look_up(std::size_t shape, const std::vector<py::bytes>& given) const {
    const unsigned number = check(shape);
    const std::vector<KvKey> keys = keys_of(given);
    Found found;
    found.reserve(keys.size());
    for (const KvFound& one : pool_->look_up(number, keys)) {
      found.emplace_back(one.id, one.word);
    }
    return found;
  }

  bool back_next(std::uint64_t ahead_bytes) {
    const py::gil_scoped_release released;
    return pool_->back_next(ahead_bytes);
  }

  std::size_t reclaim() {
    const py::gil_scoped_release released;
    return pool_->reclaim();
  }

  void close() {
    const py::gil_scoped_release released;
    pool_->close();
  }

  std::size_t free_blocks(std::size_t shape) const { return pool_->free_blocks(check(shape)); }
  std::uint64_t used_bytes() const { return pool_->used_bytes(); }
  std::uint64_t charged_bytes() const { return pool_->charged_bytes(); }
  std::uint64_t slab_searches() const { return slab_searches_.load(); }
  std::uint64_t evicted() const { return pool_->evicted(); }
  std::uint64_t quota_bytes() const { return pool_->quota_bytes(); }
  std::uint64_t identity() const { return pool_->identity(); }
  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(pool_->arena().base()); }

  py::buffer_info buffer() {
    return {pool_->arena().base(), 1, py::format_descriptor<std::uint8_t>::format(),
            static_cast<py::ssize_t>(pool_->arena().bytes())};
  }

  // Blocks allocated one by one while `held` others stay: nanoseconds of each.
  double time_allocations(std::size_t shape, std::size_t held, std::size_t rounds) {
    constexpr std::size_t kTurn = 64;  // are freed again, which is not timed
    const unsigned number = check(shape);
    const Ids others = allocate(shape, held);
    const py::gil_scoped_release released;
    Ids turn(kTurn);
    std::chrono::steady_clock::duration taken{};
    for (std::size_t round = 0; round < rounds; ++round) {
      const auto start = std::chrono::steady_clock::now();
      for (std::uint64_t& id : turn) {
        pool_->allocate(number, 1, &id, Effort::full);
      }
      taken += std::chrono::steady_clock::now() - start;
      pool_->free(number, turn, false, 0);
    }
    pool_->free(number, others, false, 0);
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count();
    return static_cast<double>(ns) / static_cast<double>(rounds * kTurn);
  }

 private:
  unsigned check(std::size_t shape) const {
    const std::size_t count = pool_->geometry().shapes.size();
    if (shape >= count) {
      throw py::index_error("block shape " + std::to_string(shape) + " of " +
                            std::to_string(count));
    }
    return static_cast<unsigned>(shape);
  }

  unsigned check(std::size_t shape, const Ids& ids, const Ids& words) const {
    if (ids.size() != words.size()) {
      throw py::value_error(std::to_string(ids.size()) + " blocks and " +
                            std::to_string(words.size()) + " words");
    }
    return check(shape);
  }

  std::size_t most_blocks(unsigned shape) const {
    const KvGeometry& geometry = pool_->geometry();
    return geometry.slab_count * geometry.blocks_of(shape);
  }

  [[noreturn]] void refuse(unsigned shape, std::size_t count, Given why) const {
    const std::string need = "need " + std::to_string(count) + " KV blocks of " +
                             std::to_string(pool_->geometry().shapes[shape].block_bytes) + " bytes";
    if (why == Given::no_memory) {
      throw shm::OutOfBlocks(need +
                             ", and shared memory is full; free memory in /dev/shm or make "
                             "it larger (docker: --shm-size)");
    }
    throw shm::OutOfBlocks(need + ", " + std::to_string(pool_->free_blocks(shape)) + " of " +
                           std::to_string(most_blocks(shape)) + " are free" +
                           (why == Given::over_quota ? " within this client's share" : "") +
                           "; raise --kv-budget-gb or lower --max-batch");
  }

  std::unique_ptr<KvPool> pool_;
  std::atomic<std::uint64_t> slab_searches_{0};
};

void bind_facts(py::class_<PyKvPool>& pool) {
  pool.def_property_readonly("used_bytes", &PyKvPool::used_bytes)
      .def_property_readonly("charged_bytes", &PyKvPool::charged_bytes)
      .def_property_readonly("slab_searches", &PyKvPool::slab_searches)
      .def_property_readonly("evicted", &PyKvPool::evicted)
      .def_property_readonly("quota_bytes", &PyKvPool::quota_bytes)
      .def_property_readonly("identity", &PyKvPool::identity)
      .def_property_readonly("address", &PyKvPool::address);
}

void bind_rest(py::class_<PyKvPool>& pool) {
  pool.def("rest", &PyKvPool::rest, py::arg("shape"), py::arg("blocks"), py::arg("offer") = 0)
      .def("wake", &PyKvPool::wake, py::arg("shape"), py::arg("blocks"), py::arg("words"))
      .def("still_rest", &PyKvPool::still_rest, py::arg("shape"), py::arg("blocks"),
           py::arg("words"))
      .def("tell", &PyKvPool::tell, py::arg("shape"), py::arg("keys"), py::arg("blocks"),
           py::arg("words"))
      .def("look_up", &PyKvPool::look_up, py::arg("shape"), py::arg("keys"));
}

}  // namespace

void bind_kv_pool(py::module_& module) {
  py::class_<memory::DeviceBytes, std::shared_ptr<memory::DeviceBytes>>(module, "DeviceBytes");
  py::class_<PyKvPool> pool(module, "KvPool", py::buffer_protocol());
  bind_facts(pool);
  bind_rest(pool);
  pool.def_static(
          "open_private",
          [](const std::tuple<std::uint64_t, std::uint64_t>& slabs, const Shapes& shapes,
             std::uint64_t quota_bytes, std::uintptr_t address,
             std::shared_ptr<memory::DeviceBytes> device) {
            const auto [slab_bytes, slab_count] = slabs;
            return std::make_unique<PyKvPool>(
                KvPool::open_private(geometry_of(slab_bytes, slab_count, shapes), quota_bytes,
                                     reinterpret_cast<void*>(address), std::move(device)));
          },
          py::arg("slabs"), py::arg("shapes"), py::arg("quota_bytes"), py::arg("address") = 0,
          py::arg("device") = py::none())
      .def_static(
          "open_shared",
          [](const std::string& path, const std::tuple<std::uint64_t, std::uint64_t>& slabs,
             const Shapes& shapes, std::uint64_t quota_bytes) {
            const py::gil_scoped_release released;
            const auto [slab_bytes, slab_count] = slabs;
            return std::make_unique<PyKvPool>(KvPool::open_shared(
                path, geometry_of(slab_bytes, slab_count, shapes), quota_bytes));
          },
          py::arg("path"), py::arg("slabs"), py::arg("shapes"), py::arg("quota_bytes"))
      .def("allocate", &PyKvPool::allocate, py::arg("shape"), py::arg("count"))
      .def("free", &PyKvPool::free, py::arg("shape"), py::arg("blocks"),
           py::arg("is_poisoned") = false, py::arg("offer") = 0)
      .def("offer", &PyKvPool::offer, py::arg("shape"), py::arg("blocks"))
      .def("take", &PyKvPool::take, py::arg("shape"), py::arg("blocks"), py::arg("sender"))
      .def("back_next", &PyKvPool::back_next, py::arg("ahead_bytes"))
      .def("reclaim", &PyKvPool::reclaim)
      .def("close", &PyKvPool::close)
      .def("free_blocks", &PyKvPool::free_blocks, py::arg("shape"))
      .def("time_allocations", &PyKvPool::time_allocations, py::arg("shape"), py::arg("held"),
           py::arg("rounds"))
      .def_buffer(&PyKvPool::buffer);
}

}  // namespace aegaeon
