package store

import "sync"

// keyCache holds every key by hash. Writers on this server apply their change at once; the watch repeats it later,
// and revisions decide which of two is newer.
type keyCache struct {
	mu     sync.RWMutex
	byHash map[string]Record[Key]
	hashes map[string]string // by id
	// gone holds the revision of each local deletion that the watch has not repeated yet, so that an older "put" of
	// the same key, still on its way, cannot bring the key back.
	gone map[string]int64
}

func newKeyCache() *keyCache {
	return &keyCache{byHash: map[string]Record[Key]{}, hashes: map[string]string{}, gone: map[string]int64{}}
}

func (c *keyCache) watcher() Watcher[Key] {
	return Watcher[Key]{Reset: c.reset, Put: c.put, Delete: c.repeatRemove}
}

func (c *keyCache) lookup(hash string) (Key, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	r, ok := c.byHash[hash]
	return r.Value, ok
}

// reset replaces everything up to revision.
func (c *keyCache) reset(records []Record[Key], revision int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, hash := range c.hashes {
		if c.byHash[hash].Revision <= revision {
			c.drop(id)
		}
	}
	for _, r := range records {
		c.apply(r)
	}
	for id, rev := range c.gone {
		if rev <= revision {
			delete(c.gone, id)
		}
	}
}

func (c *keyCache) put(r Record[Key]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.apply(r)
}

// remove applies a deletion made by this server.
func (c *keyCache) remove(id string, revision int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone[id] = revision
	c.drop(id)
}

// repeatRemove applies a deletion that the watch reports.
func (c *keyCache) repeatRemove(id string, revision int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone[id] <= revision {
		delete(c.gone, id)
	}
	if hash, ok := c.hashes[id]; ok && c.byHash[hash].Revision < revision {
		c.drop(id)
	}
}

// apply takes r where nothing newer is known. The caller holds mu.
func (c *keyCache) apply(r Record[Key]) {
	if r.Revision < c.gone[r.Name] {
		return
	}
	if hash, ok := c.hashes[r.Name]; ok {
		if c.byHash[hash].Revision > r.Revision {
			return
		}
		c.drop(r.Name)
	}
	c.byHash[r.Value.Hash] = r
	c.hashes[r.Name] = r.Value.Hash
}

// drop forgets a key. The caller holds mu.
func (c *keyCache) drop(id string) {
	if hash, ok := c.hashes[id]; ok {
		delete(c.byHash, hash)
		delete(c.hashes, id)
	}
}
