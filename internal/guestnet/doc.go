// Package guestnet gives each sandbox its network: a namespace of its own, a point-to-point link to the machine, an
// address of the node's range, and rules that keep it away from everything but what its policy allows.
//
// It owns the links named "clo" + node + index, the nftables table "inet cloister_<node>" and one unreachable route for
// the node's range, and touches nothing else but net.ipv4.ip_forward, which it switches on and never off. It must not
// know engines, records or the API: callers persist Attachments and hand them back through Adopt.
//
// Namespaces have no names and no mounts: an open file of this process holds a namespace until its guest runs, and the
// guest's processes hold it afterwards. What nobody holds, the kernel takes away, links included; nothing but elements of
// the table can be left behind by a kill at any moment, and Sweep takes those.
//
// After a start the order of calls is New, Adopt for each sandbox that still runs, Sweep, then Run beside everything else.
// A Manager is safe for concurrent use. Lock order: firewall.mu is taken with nothing held; Manager.mu is taken last and
// never held across a system call.
package guestnet
