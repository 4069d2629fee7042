package guestnet

// ledger says which indexes are free. An index that was in use goes to the end of the line, so that its address rests
// for as long as the range allows. It performs no I/O and needs its owner's lock.
type ledger struct {
	first, last int // the valid indexes
	start       int // where the never-used ones begin: another place after each restart
	visited     int // how many of those were looked at
	used        map[int]struct{}
	resting     []int // freed, oldest first
}

func newLedger(first, last, start int) *ledger {
	return &ledger{first: first, last: last, start: start, used: make(map[int]struct{})}
}

// take reserves a free index; ok is false when there is none.
func (l *ledger) take() (index int, ok bool) {
	size := l.last - l.first + 1
	for l.visited < size {
		index := l.first + (l.start+l.visited)%size
		l.visited++
		if l.claim(index) {
			return index, true
		}
	}
	for len(l.resting) > 0 {
		index := l.resting[0]
		l.resting = l.resting[1:]
		if l.claim(index) {
			return index, true
		}
	}
	return 0, false
}

// claim reserves a given index; it reports false when the index is in use.
func (l *ledger) claim(index int) bool {
	if _, inUse := l.used[index]; inUse {
		return false
	}
	l.used[index] = struct{}{}
	return true
}

// free gives an index back, to rest behind all others.
func (l *ledger) free(index int) {
	if _, inUse := l.used[index]; !inUse {
		return
	}
	delete(l.used, index)
	l.resting = append(l.resting, index)
}

func (l *ledger) holds(index int) bool {
	_, inUse := l.used[index]
	return inUse
}
