package erofs

import (
	"context"
	"encoding/binary"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The sizes and constants of the on-disk format: https://docs.kernel.org/filesystems/erofs.html and the kernel's
// fs/erofs/erofs_fs.h.
const (
	blockBits  = 12
	blockSize  = 1 << blockBits
	slotBits   = 5
	slotSize   = 1 << slotBits
	superStart = 1024
	superSize  = 128
	inodeSize  = 64
	direntSize = 12

	magic            = 0xe0f5e1e2
	featureChecksum  = 1 << 0
	featureMtime     = 1 << 1
	formatPlain      = 0<<1 | 1
	formatInline     = 2<<1 | 1
	maxSymlinkTarget = blockSize - 1
)

// inode is a node with its place in the image.
type inode struct {
	node   *tree.Node
	parent *inode
	number uint32
	links  uint32
	// nid is the inode's place in slots from the start of the image.
	nid uint64
	// size is the length of the data; inline of it, from the end, follow the inode and the rest is in blocks.
	size   int64
	inline int
	// block is the first data block.
	block uint32
	// parts are the blocks of a directory, as the names that each begins with.
	parts []dirBlock
	kids  []kid
}

// kid is one name of a directory.
type kid struct {
	name string
	ino  *inode
}

// dirBlock is a run of kids that fit into one block together, and the bytes that they fill.
type dirBlock struct {
	from, to int
	used     int
}

// layout is the plan of an image: every decision is made here, the writer only follows it.
type layout struct {
	// inodes are in the order in which they lie in the image: depth first, names in byte order.
	inodes []*inode
	// metaEnd is where the inodes end, in bytes; the data blocks begin at the next block.
	metaEnd int64
	blocks  int64
}

// planner builds a layout.
type planner struct {
	layout
	seen map[*tree.Node]*inode
}

// plan decides the place of everything.
func plan(ctx context.Context, root *tree.Node) (*layout, error) {
	p := planner{seen: map[*tree.Node]*inode{}}
	p.metaEnd = superStart + superSize
	top := p.collect(root, nil)
	top.parent = top
	for _, ino := range p.inodes {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		if err := p.placeInode(ino); err != nil {
			return nil, err
		}
	}
	if err := p.placeBlocks(); err != nil {
		return nil, err
	}
	return &p.layout, nil
}

func (p *planner) collect(n *tree.Node, parent *inode) *inode {
	ino := &inode{node: n, parent: parent, number: uint32(len(p.inodes) + 1), links: 1} //nolint:gosec // bounded by the tree's limit
	p.seen[n] = ino
	p.inodes = append(p.inodes, ino)
	if !n.IsDir() {
		return ino
	}
	ino.links = 2
	names := n.Names()
	ino.kids = make([]kid, 0, len(names)+2)
	ino.kids = append(ino.kids, kid{".", ino}, kid{"..", parent})
	for _, name := range names {
		child := n.Child(name)
		to, again := p.seen[child]
		switch {
		case again:
			to.links++
		case child.IsDir():
			ino.links++
			to = p.collect(child, ino)
		default:
			to = p.collect(child, ino)
		}
		ino.kids = append(ino.kids, kid{name, to})
	}
	if parent == nil {
		ino.kids[1].ino = ino
	}
	slices.SortFunc(ino.kids, func(a, b kid) int {
		switch {
		case a.name < b.name:
			return -1
		case a.name > b.name:
			return 1
		}
		return 0
	})
	return ino
}

// placeInode gives an inode its slot. Data that ends in the inode's own block saves one: directories and symbolic links
// get that; regular files do not, since gVisor maps them from the image and needs them at a block's start.
func (p *planner) placeInode(ino *inode) error {
	ino.size = ino.node.Size()
	tail := 0
	switch ino.node.Type() {
	case unix.S_IFDIR:
		ino.parts = pack(ino.kids)
		last := ino.parts[len(ino.parts)-1].used
		ino.size = int64(len(ino.parts)-1)*blockSize + int64(last)
		tail = last
	case unix.S_IFLNK:
		if ino.size > maxSymlinkTarget {
			return sandbox.Invalidf("symbolic link target of %d bytes; at most %d are allowed", ino.size, maxSymlinkTarget)
		}
		tail = int(ino.size)
	}
	if tail+inodeSize <= blockSize {
		ino.inline = tail
	}
	at := align(p.metaEnd, slotSize)
	if need := int64(inodeSize + ino.inline); ino.inline > 0 && at%blockSize+need > blockSize {
		at = align(at, blockSize)
	}
	ino.nid = uint64(at) >> slotBits //nolint:gosec // never negative
	p.metaEnd = at + inodeSize + int64(ino.inline)
	return nil
}

// placeBlocks lays the data blocks out: those of directories and links first, near the inodes, then those of files.
func (p *planner) placeBlocks() error {
	next := align(p.metaEnd, blockSize) >> blockBits
	for _, files := range []bool{false, true} {
		for _, ino := range p.inodes {
			rest := ino.size - int64(ino.inline)
			if rest == 0 || files != (ino.node.Type() == unix.S_IFREG) {
				continue
			}
			if count := align(rest, blockSize) >> blockBits; next > math.MaxUint32-count {
				return sandbox.Invalidf("the image needs more than %d blocks of %d bytes", uint32(math.MaxUint32), blockSize)
			} else { //nolint:revive // count belongs to the check
				ino.block = uint32(next) //nolint:gosec // checked above
				next += count
			}
		}
	}
	p.blocks = next
	return nil
}

// pack spreads names over blocks; a name and its entry are never apart.
func pack(kids []kid) []dirBlock {
	var parts []dirBlock
	cur := dirBlock{}
	for i, k := range kids {
		need := direntSize + len(k.name)
		if cur.used+need > blockSize {
			cur.to = i
			parts = append(parts, cur)
			cur = dirBlock{from: i}
		}
		cur.used += need
	}
	cur.to = len(kids)
	return append(parts, cur)
}

// appendDirBlock appends a directory block: the entries, then the names.
func appendDirBlock(b []byte, ino *inode, part dirBlock) []byte {
	kids := ino.kids[part.from:part.to]
	nameAt := len(kids) * direntSize
	for _, k := range kids {
		b = binary.LittleEndian.AppendUint64(b, k.ino.nid)
		b = binary.LittleEndian.AppendUint16(b, uint16(nameAt)) //nolint:gosec // within a block
		b = append(b, fileType(k.ino.node), 0)
		nameAt += len(k.name)
	}
	for _, k := range kids {
		b = append(b, k.name...)
	}
	return b
}

func fileType(n *tree.Node) byte {
	switch n.Type() {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	default:
		return 0
	}
}

func align(n, to int64) int64 { return (n + to - 1) &^ (to - 1) }
