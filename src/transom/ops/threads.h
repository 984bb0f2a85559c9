// Threads that share the chunks of one job with the thread that calls.
//
// Chunks are claimed one at a time, and the caller claims them too. It waits only for chunks that
// another thread has begun. So a job is never slower than on one thread by more than one chunk,
// even if another process uses the cores. Idle threads spin for a moment, because the next product
// of a model follows soon, and then sleep.

#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

inline void pause_core() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    using Work = void (*)(const void* job, int64_t chunk);

    // Run work(job, 0) ... work(job, chunks - 1) on so many threads, the caller among them.
    void run(Work work, const void* job, int64_t chunks, int threads) {
        std::unique_lock<std::mutex> alone(callers_, std::try_to_lock);
        if (threads < 2 || chunks < 2 || chunks > most_chunks || !alone.owns_lock()) {
            for (int64_t chunk = 0; chunk < chunks; ++chunk) work(job, chunk);
            return;
        }
        grow(threads - 1);
        work_ = work;
        job_ = job;
        done_.store(0, std::memory_order_relaxed);
        active_.store(threads - 1, std::memory_order_relaxed);
        const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 40) + 1;
        ticket_.store(number << 40 | uint64_t(chunks) << 20, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst)) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        help();
        for (int turn = 0; done_.load(std::memory_order_acquire) < chunks; ++turn) {
            if (turn < 4096) {
                pause_core();
            } else {  // the thread with the last chunk may wait for this core
                std::this_thread::yield();
            }
        }
    }

  private:
    static constexpr int64_t most_chunks = 1 << 19;

    // Do chunks until none is left. The count of chunks travels with the ticket: a thread that
    // comes late claims nothing of a job that is over, and doesn't read the next one by halves.
    void help() {
        while (true) {
            const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
            const int64_t next = ticket & 0xfffff, chunks = ticket >> 20 & 0xfffff;
            if (next >= chunks) return;
            work_(job_, next);
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    void grow(int wanted) {
        try {
            while (size_ < wanted) {
                std::thread(&Pool::serve, this, size_).detach();
                ++size_;
            }
        } catch (const std::system_error&) {
            // No further thread can be had: those that exist do the work.
        }
    }

    void serve(int index) {
        uint64_t seen = 0;
        while (true) {
            seen = next_job(seen);
            if (index < active_.load(std::memory_order_relaxed)) help();
        }
    }

    // Wait until there is another job than that of number `seen`, and return its number.
    uint64_t next_job(uint64_t seen) {
        const auto number = [this] { return ticket_.load(std::memory_order_seq_cst) >> 40; };
        const auto limit = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
        do {
            for (int turn = 0; turn < 64; ++turn) {
                if (number() != seen) return number();
                pause_core();
            }
        } while (std::chrono::steady_clock::now() < limit);
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return number() != seen; });
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
        return number();
    }

    std::mutex callers_, sleep_;
    std::condition_variable wake_;
    std::atomic<int> sleeping_{0}, active_{0};
    std::atomic<int64_t> done_{0};
    // Bits 40 and up: the number of the job. 20 to 39: its chunks. 0 to 19: the next chunk.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    Work work_ = nullptr;
    const void* job_ = nullptr;
    int size_ = 0;
};

inline std::atomic<Pool*> the_pool{nullptr};

// The pool of this process. It is never freed, since its threads run until the process ends. A
// forked child has none of the threads, and gets a pool of its own.
inline Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        the_pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
    });
    return *the_pool;
}

// Call work(0) ... work(chunks - 1) on so many threads.
template <class Work>
void in_pool(const Work& work, int64_t chunks, int threads) {
    const auto call = [](const void* self, int64_t chunk) {
        (*static_cast<const Work*>(self))(chunk);
    };
    pool().run(call, &work, chunks, threads);
}
