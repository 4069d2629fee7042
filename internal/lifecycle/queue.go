package lifecycle

import (
	"container/heap"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// queue holds when each sandbox is to be looked at next, each sandbox once.
type queue struct {
	order heapOrder
	at    map[sandbox.ID]*entry
}

type entry struct {
	id    sandbox.ID
	due   time.Time
	tries int
	index int
}

func newQueue() *queue { return &queue{at: make(map[sandbox.ID]*entry)} }

// set makes due the time at which id is looked at.
func (q *queue) set(id sandbox.ID, due time.Time) {
	if e := q.at[id]; e != nil {
		e.due = due
		heap.Fix(&q.order, e.index)
		return
	}
	e := &entry{id: id, due: due}
	q.at[id] = e
	heap.Push(&q.order, e)
}

// drop forgets id.
func (q *queue) drop(id sandbox.ID) {
	if e := q.at[id]; e != nil {
		heap.Remove(&q.order, e.index)
		delete(q.at, id)
	}
}

// hasten makes everything due by now.
func (q *queue) hasten(now time.Time) {
	for _, e := range q.order {
		e.due = now
	}
	heap.Init(&q.order)
}

// take removes up to n entries that are due, the earliest first.
func (q *queue) take(now time.Time, n int) []entry {
	var out []entry
	for len(q.order) > 0 && len(out) < n && !q.order[0].due.After(now) {
		e := q.order[0]
		heap.Pop(&q.order)
		delete(q.at, e.id)
		out = append(out, *e)
	}
	return out
}

// next returns when the earliest entry is due; ok is false where there is none.
func (q *queue) next() (due time.Time, ok bool) {
	if len(q.order) == 0 {
		return time.Time{}, false
	}
	return q.order[0].due, true
}

// heapOrder is a heap by time.
//
//nolint:recvcheck // heap.Interface wants both kinds of receivers
type heapOrder []*entry

func (h heapOrder) Len() int           { return len(h) }
func (h heapOrder) Less(i, j int) bool { return h[i].due.Before(h[j].due) }

func (h heapOrder) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push is heap.Interface's.
func (h *heapOrder) Push(x any) {
	e, ok := x.(*entry)
	if !ok {
		return
	}
	e.index = len(*h)
	*h = append(*h, e)
}

// Pop is heap.Interface's.
func (h *heapOrder) Pop() any {
	old := *h
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return e
}
