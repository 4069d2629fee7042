package control

import (
	"cmp"
	"slices"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// place is where a sandbox stands in the list: by start, then by id.
type place struct {
	at int64 // nanoseconds of Unix time
	id sandbox.ID
}

func placeOf(b *sandbox.Sandbox) place {
	if b.StartedAt.IsZero() {
		return place{id: b.ID}
	}
	return place{at: b.StartedAt.UnixNano(), id: b.ID}
}

func (p place) compare(o place) int { return cmp.Or(cmp.Compare(p.at, o.at), cmp.Compare(p.id, o.id)) }

// entry is what the index holds of one sandbox. It is never changed once it is in the index, only replaced.
type entry struct {
	box sandbox.Sandbox
	// sequence is that of the node's report that told of this; 0 while only the answer to a command did.
	sequence int64
	// epoch is the node's registration under which it was told.
	epoch int64
	// final means that the node has ended the sandbox on our command: whatever else it reports was before that.
	final bool
	// was is the state that the sandbox had when its node went down, for when that returns; empty for all others.
	was sandbox.State
}

func (e *entry) place() place { return placeOf(&e.box) }

// chunkLen is how many entries a chunk of the list holds at most.
const chunkLen = 512

// ordered is a list of entries, the oldest first, cut into chunks so that an insertion moves few of them. New sandboxes
// come last, where insertion costs nothing.
type ordered struct {
	chunks [][]*entry // none is empty
}

// chunkOf returns the first chunk whose last entry is not before p.
func (o *ordered) chunkOf(p place) int {
	i, _ := slices.BinarySearchFunc(o.chunks, p, func(c []*entry, p place) int { return c[len(c)-1].place().compare(p) })
	return i
}

func find(chunk []*entry, p place) (int, bool) {
	return slices.BinarySearchFunc(chunk, p, func(e *entry, p place) int { return e.place().compare(p) })
}

// put inserts e, or replaces the entry in its place.
func (o *ordered) put(e *entry) {
	p := e.place()
	c := o.chunkOf(p)
	if c == len(o.chunks) {
		if c == 0 || len(o.chunks[c-1]) == chunkLen {
			o.chunks = append(o.chunks, make([]*entry, 0, 8))
			c++
		}
		o.chunks[c-1] = append(o.chunks[c-1], e)
		return
	}
	i, there := find(o.chunks[c], p)
	if there {
		o.chunks[c][i] = e
		return
	}
	o.chunks[c] = slices.Insert(o.chunks[c], i, e)
	if len(o.chunks[c]) > chunkLen {
		left, right := slices.Clone(o.chunks[c][:chunkLen/2]), slices.Clone(o.chunks[c][chunkLen/2:])
		o.chunks[c] = left
		o.chunks = slices.Insert(o.chunks, c+1, right)
	}
}

func (o *ordered) remove(p place) {
	c := o.chunkOf(p)
	if c == len(o.chunks) {
		return
	}
	i, there := find(o.chunks[c], p)
	if !there {
		return
	}
	o.chunks[c] = slices.Delete(o.chunks[c], i, i+1)
	if len(o.chunks[c]) == 0 {
		o.chunks = slices.Delete(o.chunks, c, c+1)
	}
}

// ascend calls f with the entries after p, the oldest first, until f returns false.
func (o *ordered) ascend(p place, f func(*entry) bool) {
	for c := o.chunkOf(p); c < len(o.chunks); c++ {
		chunk := o.chunks[c]
		i, there := find(chunk, p)
		if there {
			i++
		}
		for _, e := range chunk[i:] {
			if !f(e) {
				return
			}
		}
	}
}

// descend calls f with the entries before p, the newest first, until f returns false.
func (o *ordered) descend(p place, f func(*entry) bool) {
	c := o.chunkOf(p)
	if c == len(o.chunks) {
		c--
	}
	for ; c >= 0; c-- {
		chunk := o.chunks[c]
		i, _ := find(chunk, p)
		for i--; i >= 0; i-- {
			if !f(chunk[i]) {
				return
			}
		}
	}
}
