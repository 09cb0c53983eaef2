package main

import (
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/mattn/go-isatty"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"trivet/hsmsync"
)

// progress shows what a long act does: a bar for each step on a terminal, elsewhere a line when a step is done.
type progress struct {
	w    io.Writer
	bars *mpb.Progress // nil: no terminal

	mu   sync.Mutex
	step string
	bar  *mpb.Bar
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w}
	if f, ok := w.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
		p.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(48))
	}
	return p
}

// show is told how far the act has come; each step has its own bar or line.
func (p *progress) show(now hsmsync.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	step := now.Step
	if now.Member != "" {
		step = now.Member + ": " + step
	}
	if p.bars == nil {
		if now.Done == now.Total {
			fmt.Fprintln(p.w, step+count(now))
		}
		return
	}
	if step != p.step {
		p.finish()
		p.step = step
		p.bar = p.bars.AddBar(int64(now.Total),
			mpb.PrependDecorators(decor.Name(step, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.CountersNoUnit("%d/%d")))
	}
	p.bar.SetCurrent(int64(now.Done))
}

func count(now hsmsync.Progress) string {
	if now.Total < 2 {
		return ": done"
	}
	return fmt.Sprintf(": %d of %d", now.Done, now.Total)
}

// finish leaves the present bar as it is. The caller holds mu.
func (p *progress) finish() {
	if p.bar != nil {
		p.bar.Abort(false)
		p.bar = nil
	}
}

// end is called when nothing more is to be shown; it may be called again.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.finish()
	if p.bars != nil {
		p.bars.Wait()
		p.bars = nil
	}
}
