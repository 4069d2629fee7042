package guest

import (
	"net/http"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

const (
	// restAfter is how long nothing must be under way before memory is given back.
	restAfter = 2 * time.Second
	// restBytes is how much must have been allocated since the last time to make that worth the work.
	restBytes = 1 << 20
)

// rest gives memory back to the system when the agent falls idle after work. Its timer runs only then.
type rest struct {
	mu     sync.Mutex
	active int
	timer  *time.Timer
	freed  uint64 // bytes allocated in all when memory was last given back
	wg     sync.WaitGroup
}

// begin and end frame a request or a process.
func (r *rest) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.active++
	if r.timer != nil && r.timer.Stop() {
		r.wg.Done()
	}
	r.timer = nil
}

func (r *rest) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.active--; r.active > 0 || allocated()-r.freed < restBytes {
		return
	}
	r.wg.Add(1)
	r.timer = time.AfterFunc(restAfter, func() {
		defer r.wg.Done()
		r.release()
	})
}

func (r *rest) release() {
	r.mu.Lock()
	if r.active > 0 {
		r.mu.Unlock()
		return
	}
	r.timer, r.freed = nil, allocated()
	r.mu.Unlock()
	runtime.GC() // pools let go of what they hold in two collections
	debug.FreeOSMemory()
}

// stop waits for a release that is under way.
func (r *rest) stop() {
	r.begin()
	r.wg.Wait()
}

// around frames requests.
func (r *rest) around(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.begin()
		defer r.end()
		next.ServeHTTP(w, req)
	})
}

// allocated returns how many bytes were ever allocated.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
