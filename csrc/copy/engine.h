// Copies that run beside everything else, on threads of their own: see queue.h for what is copied
// when, carrier.h for how.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "copy/carrier.h"
#include "copy/queue.h"
#include "copy/ticket.h"

namespace aegaeon::copy {

struct EngineOptions {
  unsigned threads = 1;
  std::size_t chunk_bytes = std::size_t{1} << 20;
  std::uint64_t link_bytes_per_s = 0;  // 0: as fast as it goes
  bool is_duplex = true;               // each direction has the whole rate
};

// Used from any thread. In a forked child it has no threads: close() does nothing, all else raises
// CopyError.
class Engine {
 public:
  // Raises std::invalid_argument, and CopyError when a thread cannot be started.
  static std::shared_ptr<Engine> start(const EngineOptions& options,
                                       std::unique_ptr<Backend> backend = host_backend());
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // `after`: tickets of this engine. Raises std::invalid_argument, CopyQueueFull, LinkLost, and
  // CopyError when closed.
  TicketPtr submit(Order order, const std::vector<TicketPtr>& after = {});
  // Waits up to `timeout_ns` until `bytes` are in, or the ticket is over without; says whether they
  // are.
  bool wait(Ticket& ticket, std::size_t bytes, std::int64_t timeout_ns);
  // Ends the ticket, unless it has ended. When this returns, no thread touches its memory.
  void cancel(const TicketPtr& ticket);
  void raise_priority(const TicketPtr& ticket, unsigned priority);
  // From its first byte to its end, or to now.
  double seconds(const Ticket& ticket) const;
  bool is_over(const Ticket& ticket) const;
  std::string failure(const Ticket& ticket) const;
  std::size_t open_tickets() const;

  // Cancels everything and joins the threads. Idempotent.
  void close();

 private:
  using Lock = std::unique_lock<std::mutex>;
  using Begun = std::deque<Flight>;

  Engine(const EngineOptions& options, std::unique_ptr<Backend> backend);

  void start_thread(Carrier& carrier);
  bool is_forked() const;
  void work(Carrier& carrier);
  bool begin_next(Carrier& carrier, std::int64_t now, Lock& lock, Begun& begun);
  void end_oldest(Carrier& carrier, Lock& lock, Begun& begun);
  void wake();
  void sleep(Lanes lanes, std::int64_t now, Lock& lock);
  void check_process() const;
  void announce();
  void lose(const std::string& why);

  const EngineOptions options_;
  const std::unique_ptr<Backend> backend_;
  const std::vector<std::unique_ptr<Carrier>> carriers_;
  const pid_t pid_;
  mutable std::mutex mutex_;         // guards the queue, its tickets and what follows
  std::condition_variable work_;     // something to claim or to land
  std::condition_variable changed_;  // see Queue::changes
  std::uint64_t announced_changes_ = 0;
  unsigned waiters_ = 0;
  Queue queue_;
  unsigned sleepers_ = 0;
  bool is_closed_ = false;
  std::string lost_;    // why no copy will be made any more; empty while they are
  std::mutex closing_;  // guards the threads
  std::vector<std::thread> threads_;
};

}  // namespace aegaeon::copy
