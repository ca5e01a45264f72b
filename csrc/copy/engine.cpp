#include "copy/engine.h"

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "copy/errors.h"
#include "copy/host.h"
#include "shm/futex.h"

namespace aegaeon::copy {
namespace {

using shm::now_ns;
using std::chrono::nanoseconds;

constexpr unsigned kMaxThreads = 64;
// Pieces of scattered tickets below this are not worth a fence each.
constexpr std::size_t kStreamPieceBytes = 4096;
// The kernel may be late with a wake-up by this; its default of 50 us shows at high link rates.
constexpr unsigned long kTimerSlackNs = 1000;

std::chrono::steady_clock::time_point point_of(std::int64_t ns) {
  return std::chrono::steady_clock::time_point(nanoseconds(ns));
}

void check(const EngineOptions& options) {
  if (options.threads == 0 || options.threads > kMaxThreads) {
    throw std::invalid_argument("threads is " + std::to_string(options.threads) + "; give 1 to " +
                                std::to_string(kMaxThreads));
  }
}

// Signals are the business of Python's main thread; faults are ours.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

void copy_on_host(std::byte* to, const std::byte* from, std::size_t bytes, bool is_long) {
  if (from < to + bytes && to < from + bytes) {
    std::memmove(to, from, bytes);
  } else if (is_long && bytes >= kStreamPieceBytes) {
    copy_streaming(to, from, bytes);
  } else {
    copy_cached(to, from, bytes);
  }
}

std::shared_ptr<Engine> Engine::start(const EngineOptions& options, Copier copier) {
  // After a fork, the child's copy says that threads wait in it, and to destroy it would wait for
  // them: so it is left where it is.
  const auto destroy = [](Engine* engine) {
    if (!engine->is_forked()) delete engine;
  };
  return {new Engine(options, std::move(copier)), destroy};
}

Engine::Engine(const EngineOptions& options, Copier copier)
    : options_(options),
      copier_(std::move(copier)),
      pid_(getpid()),
      queue_(options.chunk_bytes, options.link_bytes_per_s, options.is_duplex) {
  check(options);
  const SignalsBlocked blocked;
  try {
    while (threads_.size() < options.threads) start_thread();
  } catch (const std::system_error& error) {
    close();
    throw CopyError("copy thread " + std::to_string(threads_.size() + 1) + " of " +
                    std::to_string(options.threads) + " could not be started (" + error.what() +
                    "); ask for fewer, or raise the limit of processes or memory");
  }
}

Engine::~Engine() { close(); }

void Engine::start_thread() {
  threads_.reserve(options_.threads);
  threads_.emplace_back([this] { work(); });
  pthread_setname_np(threads_.back().native_handle(), "copy");
}

bool Engine::is_forked() const { return getpid() != pid_; }

void Engine::check_process() const {
  if (is_forked()) {
    throw CopyError("this copy engine belongs to pid " + std::to_string(pid_) +
                    " and has no threads after a fork; make one in this process");
  }
}

TicketPtr Engine::submit(Order order, const std::vector<TicketPtr>& after) {
  check_process();
  check_order(order);
  auto ticket = std::make_shared<Ticket>(std::move(order));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_closed_) {
    throw CopyError("this copy engine has been closed; make another one");
  }
  queue_.add(ticket, after, now_ns());
  announce();
  if (sleepers_ > 0) work_.notify_one();
  return ticket;
}

bool Engine::wait(Ticket& ticket, std::size_t bytes, std::int64_t timeout_ns) {
  check_process();
  std::unique_lock<std::mutex> lock(mutex_);
  const auto is_settled = [&] {
    if (ticket.has(bytes) || ticket.outcome != Outcome::open) return true;
    // Each time before it sleeps: whoever was woken has taken it away. Others' chunks wake nobody.
    ticket.awaited_bytes = std::min(ticket.awaited_bytes, bytes);
    return false;
  };
  ++waiters_;
  changed_.wait_until(lock, point_of(now_ns() + timeout_ns), is_settled);
  --waiters_;
  return ticket.has(bytes);
}

void Engine::cancel(const TicketPtr& ticket) {
  check_process();
  std::unique_lock<std::mutex> lock(mutex_);
  queue_.cancel(ticket, now_ns());
  announce();
  if (sleepers_ > 0) work_.notify_one();  // its successors may start
  ++waiters_;
  changed_.wait(lock, [&] { return ticket->touching == 0; });
  --waiters_;
}

void Engine::raise_priority(const TicketPtr& ticket, unsigned priority) {
  check_process();
  if (priority >= kPriorities) {
    throw std::invalid_argument("priority " + std::to_string(priority) +
                                " is out of range; give 0 (first) to " +
                                std::to_string(kPriorities - 1));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  queue_.raise_priority(ticket, priority);
}

double Engine::seconds(const Ticket& ticket) const {
  check_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ticket.start_ns == 0) {
    return 0.0;
  }
  const std::int64_t end = ticket.end_ns > 0 ? ticket.end_ns : now_ns();
  return static_cast<double>(std::max<std::int64_t>(end - ticket.start_ns, 0)) * 1e-9;
}

std::string Engine::failure(const Ticket& ticket) const {
  check_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  return ticket.failure;
}

std::size_t Engine::open_tickets() const {
  check_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  return queue_.open_tickets();
}

void Engine::close() {
  if (is_forked()) {
    return;
  }
  const std::lock_guard<std::mutex> closing(closing_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closed_ = true;
    queue_.cancel_all(now_ns());
    announce();
    work_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Engine::work() {
  prctl(PR_SET_TIMERSLACK, kTimerSlackNs);
  std::unique_lock<std::mutex> lock(mutex_);
  while (!is_closed_) {
    const std::int64_t now = now_ns();
    queue_.land(now);
    announce();
    std::optional<Flight> flight = queue_.claim(now);
    if (!flight) {
      sleep(lock, now);
      continue;
    }
    // The next one wakes the one after it, while there is work.
    if (sleepers_ > 0 && queue_.next_event() != kNever) work_.notify_one();
    lock.unlock();
    const std::optional<std::string> failure = copy(*flight);
    lock.lock();
    if (failure) {
      queue_.failed(*flight, *failure, now_ns());
    } else {
      queue_.copied(std::move(*flight), now_ns());
    }
    announce();
  }
}

void Engine::announce() {
  if (announced_changes_ != queue_.changes()) {
    announced_changes_ = queue_.changes();
    if (waiters_ > 0) changed_.notify_all();
  }
}

void Engine::sleep(std::unique_lock<std::mutex>& lock, std::int64_t now) {
  const std::int64_t next = queue_.next_event();
  ++sleepers_;
  if (next == kNever) {
    work_.wait(lock);
  } else if (next > now) {
    work_.wait_until(lock, point_of(next));
  }
  --sleepers_;
}

// Returns why it failed, if it did.
std::optional<std::string> Engine::copy(const Flight& flight) const {
  const std::vector<Segment>& segments = flight.ticket->segments;
  const bool is_long = flight.ticket->total_bytes >= kStreamBytes;
  std::size_t left = flight.bytes;
  try {
    for (Cursor at = flight.cursor; left > 0; at = {at.segment + 1, 0}) {
      const Segment& segment = segments[at.segment];
      const std::size_t bytes = std::min(left, segment.bytes - at.offset);
      if (bytes == 0) continue;
      copier_(segment.to + at.offset, segment.from + at.offset, bytes, is_long);
      left -= bytes;
    }
  } catch (const std::exception& error) {
    return error.what();
  }
  return std::nullopt;
}

}  // namespace aegaeon::copy
