package guest

import (
	"maps"
	"sync"
	"sync/atomic"
)

// settings is what /init hands over. A value is never changed once it is published.
type settings struct {
	token   string
	env     map[string]string
	user    string
	workdir string
}

// settingsBox holds the current settings: read without a lock, replaced one writer at a time.
type settingsBox struct {
	mu      sync.Mutex
	current atomic.Pointer[settings]
}

func newSettingsBox(user string) *settingsBox {
	b := &settingsBox{}
	b.current.Store(&settings{user: user, env: map[string]string{"E2B_SANDBOX": "true"}})
	return b
}

func (b *settingsBox) get() *settings { return b.current.Load() }

// update publishes what change makes of a copy; an error leaves the settings as they were.
func (b *settingsBox) update(change func(*settings) error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := *b.current.Load()
	next.env = maps.Clone(next.env)
	if err := change(&next); err != nil {
		return err
	}
	b.current.Store(&next)
	return nil
}
