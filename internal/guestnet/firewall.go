package guestnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
)

const (
	// elementsPerMessage keeps a message below the 64 KiB that one netlink attribute can hold.
	elementsPerMessage = 400
	// socketBytes is room for one transaction with tens of thousands of elements.
	socketBytes = 32 << 20
)

// permit is what the table says of one link.
type permit struct {
	guest    netip.Addr
	internet bool
}

// firewall keeps a node's table as its permits say. Each change is one transaction and touches one element or two; when
// the kernel refuses it, because somebody changed the table, the whole table is replaced in one transaction.
type firewall struct {
	rules ruleSet
	host  netns.NsHandle

	// mu serialises the use of conn, which interleaves its callers' messages otherwise.
	mu      sync.Mutex
	conn    *nftables.Conn
	permits map[string]permit
	built   bool
}

func newFirewall(rules ruleSet, host netns.NsHandle) *firewall {
	return &firewall{rules: rules, host: host, permits: make(map[string]permit)}
}

// put makes the table hold p for the link.
func (f *firewall) put(link string, p permit) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	before, known := f.permits[link]
	f.permits[link] = p
	if !f.built || (known && before.guest != p.guest) {
		return f.replace()
	}
	err := f.transact(func(c *nftables.Conn) error {
		var errs []error
		if !known {
			errs = append(errs, c.SetAddElements(f.set(setGuests), guestElements(link, p)))
		}
		switch {
		case p.internet && !before.internet:
			errs = append(errs, c.SetAddElements(f.set(setInternet), nameElements(link)))
		case !p.internet && before.internet:
			errs = append(errs, c.SetDeleteElements(f.set(setInternet), nameElements(link)))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return f.replace()
	}
	return nil
}

// drop makes the table forget the link.
func (f *firewall) drop(link string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, known := f.permits[link]
	if !known {
		return nil
	}
	delete(f.permits, link)
	if !f.built {
		return nil
	}
	err := f.transact(func(c *nftables.Conn) error {
		err := c.SetDeleteElements(f.set(setGuests), guestElements(link, p))
		if p.internet {
			err = errors.Join(err, c.SetDeleteElements(f.set(setInternet), nameElements(link)))
		}
		return err
	})
	if err != nil {
		return f.replace()
	}
	return nil
}

// expect notes what the table shall say of a link from the next rebuild on.
func (f *firewall) expect(link string, p permit) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.permits[link] = p
}

// rebuild replaces the table.
func (f *firewall) rebuild() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.replace()
}

// ensure builds the table if this process has not done so yet.
func (f *firewall) ensure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.built {
		return nil
	}
	return f.replace()
}

// replace puts the whole table in place of what is there, in one transaction. It needs mu.
func (f *firewall) replace() error {
	f.built = false
	err := f.transact(func(c *nftables.Conn) error {
		t := f.rules.tableRef()
		c.AddTable(t) // deleting what is not there is an error
		c.DelTable(t)
		c.AddTable(t)
		if err := f.addSets(c); err != nil {
			return err
		}
		accept := nftables.ChainPolicyAccept
		for _, ch := range f.rules.chains() {
			ref := c.AddChain(&nftables.Chain{
				Name: ch.name, Table: t, Type: ch.kind, Hooknum: ch.hook, Priority: &ch.priority, Policy: &accept,
			})
			for _, exprs := range ch.rules {
				c.AddRule(&nftables.Rule{Table: t, Chain: ref, Exprs: exprs})
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("replace nftables table inet %s: %w", f.rules.plan.table(), err)
	}
	f.built = true
	return nil
}

func (f *firewall) addSets(c *nftables.Conn) error {
	for set, fixed := range f.rules.sets() {
		elements := fixed
		for link, p := range f.permits {
			switch {
			case set.Name == setGuests:
				elements = append(elements, guestElements(link, p)...)
			case set.Name == setInternet && p.internet:
				elements = append(elements, nameElements(link)...)
			}
		}
		if err := c.AddSet(set, nil); err != nil {
			return fmt.Errorf("add set %s: %w", set.Name, err)
		}
		for part := range slices.Chunk(elements, elementsPerMessage) {
			if err := c.SetAddElements(set, part); err != nil {
				return fmt.Errorf("fill set %s: %w", set.Name, err)
			}
		}
	}
	return nil
}

// intact reports whether the table stands in the kernel with all its chains and rules.
func (f *firewall) intact() (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.dial(); err != nil {
		return false, err
	}
	for _, ch := range f.rules.chains() {
		t := f.rules.tableRef()
		got, err := f.conn.GetRules(t, &nftables.Chain{Name: ch.name, Table: t})
		if err != nil {
			f.hangUp()
			return false, fmt.Errorf("list rules of chain %s: %w", ch.name, err)
		}
		if len(got) != len(ch.rules) {
			return false, nil
		}
	}
	return true, nil
}

// remove deletes the table; one that is not there is no error.
func (f *firewall) remove() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.built = false
	clear(f.permits)
	err := f.transact(func(c *nftables.Conn) error {
		c.AddTable(f.rules.tableRef())
		c.DelTable(f.rules.tableRef())
		return nil
	})
	if err != nil {
		return fmt.Errorf("delete nftables table inet %s: %w", f.rules.plan.table(), err)
	}
	return nil
}

// tableRanges returns the ranges of this machine's nodes, by the name of their tables.
func (f *firewall) tableRanges() (map[string][]netip.Prefix, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.dial(); err != nil {
		return nil, err
	}
	out, err := nodeRanges(f.conn)
	if err != nil {
		f.hangUp()
	}
	return out, err
}

// transact sends what fill adds, as one transaction. It needs mu.
func (f *firewall) transact(fill func(*nftables.Conn) error) error {
	if err := f.dial(); err != nil {
		return err
	}
	err := fill(f.conn)
	if err == nil {
		err = f.conn.Flush()
	}
	if err != nil {
		f.hangUp() // what the socket still holds would be taken for the next answer
	}
	return err
}

// dial opens the connection in the machine's namespace. It needs mu.
func (f *firewall) dial() error {
	if f.conn != nil {
		return nil
	}
	return inNamespace(f.host, func() error {
		conn, err := dialNftables()
		f.conn = conn
		return err
	})
}

func dialNftables() (*nftables.Conn, error) {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *mdlayher.Conn) error {
		return errors.Join(c.SetWriteBuffer(socketBytes), c.SetReadBuffer(socketBytes))
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return conn, nil
}

// hangUp closes the connection. It needs mu.
func (f *firewall) hangUp() {
	if f.conn != nil {
		_ = f.conn.CloseLasting() // a socket: nothing is lost
		f.conn = nil
	}
}

func (f *firewall) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hangUp()
}

// set names one of the table's sets for a change of its elements.
func (f *firewall) set(name string) *nftables.Set {
	return &nftables.Set{Table: f.rules.tableRef(), Name: name}
}

func nameElements(link string) []nftables.SetElement {
	return []nftables.SetElement{{Key: nameKey(link)}}
}

func guestElements(link string, p permit) []nftables.SetElement {
	return []nftables.SetElement{{Key: append(nameKey(link), p.guest.AsSlice()...)}}
}
