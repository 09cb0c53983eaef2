// Package ballast has the garbage collector of a process with a small heap run rarely.
//
// The collector runs when the heap has doubled (GOGC). A node's heap is a few MB and doubles many times a second, so that a tenth of a CA node's time
// went to collecting it. A larger GOGC would help, and multiply the heap of a responder that knows millions of certificates.
package ballast

import "sync/atomic"

// octets are counted as heap, never touched, and so no memory. A small heap may grow by as much before it is collected, which is memory; a large one grows
// to twice its size as before.
const octets = 64 << 20

var block atomic.Pointer[[octets]byte]

// Load takes the ballast on board, for as long as the process lives. Call it first of all, once.
func Load() { block.Store(new([octets]byte)) }
