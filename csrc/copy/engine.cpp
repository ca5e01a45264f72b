#include "copy/engine.h"

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "copy/errors.h"
#include "shm/futex.h"

namespace aegaeon::copy {
namespace {

using shm::now_ns;
using std::chrono::nanoseconds;

constexpr unsigned kMaxThreads = 64;
// The kernel may be late with a wake-up by this; its default of 50 us shows at high link rates.
constexpr unsigned long kTimerSlackNs = 1000;

std::chrono::steady_clock::time_point point_of(std::int64_t ns) {
  return std::chrono::steady_clock::time_point(nanoseconds(ns));
}

const EngineOptions& checked(const EngineOptions& options) {
  if (options.threads == 0 || options.threads > kMaxThreads) {
    throw std::invalid_argument("threads is " + std::to_string(options.threads) + "; give 1 to " +
                                std::to_string(kMaxThreads));
  }
  return options;
}

struct Failure {
  std::string what;
  bool is_last;  // no step will succeed any more
};

// Returns why the step failed, if it did.
template <typename Step>
std::optional<Failure> try_to(const Step& step) {
  try {
    step();
  } catch (const LinkLost& error) {
    return Failure{error.what(), true};
  } catch (const std::exception& error) {
    return Failure{error.what(), false};
  }
  return std::nullopt;
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

std::shared_ptr<Engine> Engine::start(const EngineOptions& options,
                                      std::unique_ptr<Backend> backend) {
  // After a fork, the child's copy says that threads wait in it, and to destroy it would wait for
  // them: so it is left where it is.
  const auto destroy = [](Engine* engine) {
    if (!engine->is_forked()) delete engine;
  };
  return {new Engine(options, std::move(backend)), destroy};
}

Engine::Engine(const EngineOptions& options, std::unique_ptr<Backend> backend)
    : options_(checked(options)),
      backend_(std::move(backend)),
      carriers_(backend_->make_carriers(options.threads)),
      pid_(getpid()),
      queue_(options.chunk_bytes, options.link_bytes_per_s, options.is_duplex) {
  const SignalsBlocked blocked;
  try {
    threads_.reserve(carriers_.size());
    for (const auto& carrier : carriers_) start_thread(*carrier);
  } catch (const std::system_error& error) {
    close();
    throw CopyError("copy thread " + std::to_string(threads_.size() + 1) + " of " +
                    std::to_string(carriers_.size()) + " could not be started (" + error.what() +
                    "); ask for fewer, or raise the limit of processes or memory");
  }
}

Engine::~Engine() { close(); }

void Engine::start_thread(Carrier& carrier) {
  threads_.emplace_back([this, &carrier] { work(carrier); });
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
  order.fence = backend_->make_fence();
  auto ticket = std::make_shared<Ticket>(std::move(order));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_closed_) {
    throw CopyError("this copy engine has been closed; make another one");
  }
  if (!lost_.empty()) throw LinkLost(lost_);
  queue_.add(ticket, after, now_ns());
  announce();
  wake();
  return ticket;
}

bool Engine::wait(Ticket& ticket, std::size_t bytes, std::int64_t timeout_ns) {
  check_process();
  std::unique_lock<std::mutex> lock(mutex_);
  const auto is_settled = [&] {
    if (ticket.has(bytes) || ticket.is_over()) return true;
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
  wake();  // its successors may start
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

bool Engine::is_over(const Ticket& ticket) const {
  check_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  return ticket.is_over();
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

void Engine::work(Carrier& carrier) {
  prctl(PR_SET_TIMERSLACK, kTimerSlackNs);
  const std::optional<Failure> failure = try_to([&] { carrier.enter(); });
  Begun begun;
  Lock lock(mutex_);
  if (failure) {
    // Nobody else takes this thread's chunks, which would wait for ever.
    lose("a copy thread cannot begin: " + failure->what);
    return;
  }
  while (!is_closed_ || !begun.empty()) {
    const std::int64_t now = now_ns();
    queue_.land(now);
    announce();
    if (begin_next(carrier, now, lock, begun)) continue;
    if (begun.empty()) {
      sleep(carrier.lanes(), now, lock);
    } else {
      end_oldest(carrier, lock, begun);
    }
  }
}

// Whether there was a chunk to begin, and room for it.
bool Engine::begin_next(Carrier& carrier, std::int64_t now, Lock& lock, Begun& begun) {
  if (is_closed_ || begun.size() >= carrier.depth()) {
    return false;
  }
  std::optional<Flight> flight = queue_.claim(now, carrier.lanes());
  if (!flight) {
    return false;
  }
  // The next one wakes the one after it, while there is work.
  if (queue_.next_event() != kNever) wake();
  lock.unlock();
  bool is_in = false;
  const std::optional<Failure> failure = try_to([&] { is_in = carrier.begin(*flight); });
  lock.lock();
  if (failure) {
    if (failure->is_last) lose(failure->what);
    queue_.failed(*flight, failure->what, now_ns());
  } else if (is_in) {
    queue_.copied(std::move(*flight), now_ns());
  } else {
    begun.push_back(std::move(*flight));
  }
  announce();
  return true;
}

void Engine::end_oldest(Carrier& carrier, Lock& lock, Begun& begun) {
  lock.unlock();
  const std::optional<Failure> failure = try_to([&] { carrier.end_oldest(); });
  lock.lock();
  Flight flight = std::move(begun.front());
  begun.pop_front();
  if (failure) {
    if (failure->is_last) lose(failure->what);
    queue_.failed(flight, failure->what, now_ns());
  } else {
    queue_.copied(std::move(flight), now_ns());
  }
  announce();
}

// From here on every ticket is told, at once and not one by one.
void Engine::lose(const std::string& why) {
  if (lost_.empty()) lost_ = why;
  queue_.lose_all(why, now_ns());
  announce();
}

// One thread, if all take the same chunks: another one might sleep on while there is work for it.
void Engine::wake() {
  if (sleepers_ == 0) return;
  if (carriers_.front()->lanes() == kBothLanes) {
    work_.notify_one();
  } else {
    work_.notify_all();
  }
}

void Engine::announce() {
  if (announced_changes_ == queue_.changes()) return;
  announced_changes_ = queue_.changes();
  if (waiters_ > 0) changed_.notify_all();
  // What has settled may let a copy start in a direction that only another thread serves.
  if (queue_.next_event() != kNever) wake();
}

void Engine::sleep(Lanes lanes, std::int64_t now, Lock& lock) {
  const std::int64_t next = queue_.next_event(lanes);
  ++sleepers_;
  if (next == kNever) {
    work_.wait(lock);
  } else if (next > now) {
    work_.wait_until(lock, point_of(next));
  }
  --sleepers_;
}

}  // namespace aegaeon::copy
