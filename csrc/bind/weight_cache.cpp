#include "bind/weight_cache.h"

#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bind/time.h"
#include "memory/cached_model.h"
#include "memory/errors.h"
#include "memory/weight_cache.h"

namespace py = pybind11;

namespace aegaeon {
namespace {

using memory::CachedModel;
using memory::WeightCache;

memory::ModelKey key_of(const py::bytes& bytes) {
  memory::ModelKey key{};
  if (static_cast<std::size_t>(PyBytes_GET_SIZE(bytes.ptr())) != sizeof key) {
    throw py::value_error("the key of a model is a digest of 32 bytes");
  }
  std::memcpy(key.data(), PyBytes_AS_STRING(bytes.ptr()), sizeof key);
  return key;
}

memory::PlannedFile file_of(const py::handle& item) {
  const auto file = py::cast<py::tuple>(item);
  if (file.size() != 4) {
    throw py::value_error("the file of a job is a tuple of four, see CachedModel.load");
  }
  return {file[0].cast<std::string>(), file[1].cast<std::uint64_t>(), file[2].cast<std::int64_t>(),
          file[3].cast<std::uint64_t>()};
}

memory::Job job_of(const py::handle& item) {
  const auto job = py::cast<py::tuple>(item);
  if (job.size() != 10) {
    throw py::value_error("a job is a tuple of ten, see CachedModel.load");
  }
  const auto number = [&job](std::size_t at) { return job[at].cast<std::uint64_t>(); };
  return {file_of(job[0]),
          number(1),
          number(2),
          number(3),
          number(4),
          number(5),
          static_cast<memory::Layout>(job[6].cast<std::uint32_t>()),
          number(7),
          job[8].cast<std::uint32_t>(),
          static_cast<memory::Convert>(job[9].cast<std::uint32_t>())};
}

std::shared_ptr<CachedModel> acquire(WeightCache& cache, const memory::Wanted& wanted,
                                     double timeout_s) {
  const std::int64_t deadline = shm::now_ns() + to_ns(timeout_s);
  std::string refusal;
  while (true) {
    const std::uint32_t seen = cache.room_change();
    {
      const py::gil_scoped_release released;
      if (auto model = cache.acquire(wanted, refusal)) {
        return model;
      }
    }
    const std::int64_t left = deadline - shm::now_ns();
    if (left <= 0) {
      throw memory::BudgetTooSmall(refusal);
    }
    wait_chunk(left, [&](std::int64_t chunk) { cache.wait_for_room(seen, chunk); });
  }
}

bool pin(CachedModel& model) {
  if (const auto is_pinned = model.try_pin()) {
    return *is_pinned;
  }
  const py::gil_scoped_release released;
  return model.pin_slowly();
}

void unpin(CachedModel& model) {
  if (model.unpin()) {
    const py::gil_scoped_release released;
    model.free_failed();
  }
}

bool wait_stage(CachedModel& model, std::uint32_t count, double timeout_s) {
  if (model.look_for_stages(count).value_or(false)) {
    return true;
  }
  const std::int64_t deadline = shm::now_ns() + to_ns(timeout_s);
  bool has_stages = false;
  bool may_come = true;
  while (!has_stages && may_come) {
    wait_chunk(deadline - shm::now_ns(), [&](std::int64_t chunk) {
      const std::uint32_t seen = model.change();
      has_stages = model.has_stages(count);
      may_come = chunk > 0 && !has_stages && !model.is_abandoned();
      if (may_come) model.wait_for_change(seen, chunk);
    });
  }
  return has_stages;
}

void load(CachedModel& model, const py::iterable& jobs, int threads) {
  std::vector<memory::Job> parsed;
  for (const py::handle& job : jobs) parsed.push_back(job_of(job));
  {
    const py::gil_scoped_release released;
    model.start_load(std::move(parsed), threads);
  }
  try {
    for (bool is_running = true; is_running;) {
      wait_chunk(shm::kWaitChunk,
                 [&](std::int64_t chunk) { is_running = !model.wait_for_load(chunk); });
    }
  } catch (...) {  // a signal handler's
    const py::gil_scoped_release released;
    try {
      model.finish_load();
    } catch (const memory::Error&) {
      // What the load came to matters less.
    }
    throw;
  }
  const py::gil_scoped_release released;
  model.finish_load();
}

void set_demand(WeightCache& cache, const py::bytes& bytes, bool is_wanted) {
  const memory::ModelKey key = key_of(bytes);
  const py::gil_scoped_release released;
  cache.set_demand(key, is_wanted);
}

bool evict(WeightCache& cache, const py::bytes& bytes) {
  const memory::ModelKey key = key_of(bytes);
  const py::gil_scoped_release released;
  return cache.evict(key);
}

py::buffer_info buffer_of(CachedModel& model) {
  return py::buffer_info(const_cast<std::byte*>(model.address()), 1,
                         py::format_descriptor<std::uint8_t>::format(),
                         static_cast<py::ssize_t>(model.size_bytes()));
}

void bind_records(py::module_& module) {
  py::class_<memory::EntryStatus>(module, "CacheEntry")
      .def_readonly("model", &memory::EntryStatus::model)
      .def_readonly("state", &memory::EntryStatus::state)
      .def_readonly("size_bytes", &memory::EntryStatus::size_bytes)
      .def_readonly("stages", &memory::EntryStatus::stages)
      .def_readonly("stages_done", &memory::EntryStatus::stages_done)
      .def_readonly("pin_pids", &memory::EntryStatus::pin_pids)
      .def_readonly("demand_pids", &memory::EntryStatus::demand_pids)
      .def_readonly("idle_s", &memory::EntryStatus::idle_s);
  py::class_<memory::Eviction>(module, "Eviction")
      .def_readonly("number", &memory::Eviction::number)
      .def_readonly("model", &memory::Eviction::model)
      .def_readonly("size_bytes", &memory::Eviction::size_bytes)
      .def_readonly("reason", &memory::Eviction::reason)
      .def_readonly("time_s", &memory::Eviction::time_s)
      .def_readonly("pid", &memory::Eviction::pid);
}

void bind_model(py::module_& module) {
  using released = py::call_guard<py::gil_scoped_release>;
  py::class_<CachedModel, std::shared_ptr<CachedModel>>(module, "CachedModel",
                                                        py::buffer_protocol())
      .def_buffer(&buffer_of)
      .def_property_readonly("address",
                             [](const CachedModel& model) {
                               return reinterpret_cast<std::uintptr_t>(model.address());
                             })
      .def_property_readonly("size_bytes", &CachedModel::size_bytes)
      .def_property_readonly("stages", &CachedModel::stages)
      .def_property_readonly("stages_done", &CachedModel::stages_done)
      .def_property_readonly("is_loader", &CachedModel::is_loader)
      .def("pin", &pin)
      .def("unpin", &unpin)
      .def("note_use", &CachedModel::note_use)
      .def("wait_stage", &wait_stage, py::arg("count"), py::arg("timeout_s"))
      .def("take_over", &CachedModel::take_over, released())
      .def("populate", &CachedModel::populate, released())
      .def("gather", &CachedModel::gather, py::arg("offset"), released())
      .def("load", &load, py::arg("jobs"), py::arg("threads"))
      .def("cancel", &CachedModel::cancel)
      .def("close", &CachedModel::close, released());
}

}  // namespace

void bind_weight_cache(py::module_& module) {
  using released = py::call_guard<py::gil_scoped_release>;
  bind_records(module);
  bind_model(module);
  py::class_<WeightCache, std::shared_ptr<WeightCache>>(module, "WeightCache")
      .def_static(
          "open_or_create",
          [](const std::string& path, std::uint64_t budget_bytes) {
            return std::make_shared<WeightCache>(path, budget_bytes);
          },
          py::arg("path"), py::arg("budget_bytes"), released())
      .def(
          "acquire",
          [](WeightCache& cache, const py::bytes& key, const std::string& model,
             std::uint64_t size_bytes, std::uint32_t stages, double timeout_s) {
            return acquire(cache, {key_of(key), model, size_bytes, stages}, timeout_s);
          },
          py::arg("key"), py::arg("model"), py::arg("size_bytes"), py::arg("stages"),
          py::arg("timeout_s"))
      .def("set_demand", &set_demand, py::arg("key"), py::arg("is_wanted"))
      .def("evict", &evict, py::arg("key"))
      .def("prepare", &WeightCache::prepare, py::arg("size_bytes"), released())
      .def("status", &WeightCache::status, released())
      .def("evictions", &WeightCache::evictions, released())
      .def("close", &WeightCache::close, released())
      .def_property_readonly("used_bytes", &WeightCache::used_bytes)
      .def_property_readonly("spare_bytes", &WeightCache::spare_bytes)
      .def_property_readonly("ready_bytes", &WeightCache::ready_bytes)
      .def_property_readonly("budget_bytes", &WeightCache::budget_bytes)
      .def_property_readonly("bytes_read", &WeightCache::bytes_read);
}

}  // namespace aegaeon
