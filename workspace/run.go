package workspace

import (
	"context"
	"errors"
	"slices"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/source"
)

// Run runs the job. The Result is complete when err is nil, be the command's
// exit code what it may; otherwise it holds what is known.
//
// Errors of the command itself are no errors of Run, except that a command
// which cannot be started gives a *sandbox.StartError, after the workspace was
// put back. A cancelled context ends the command; the workspace is then
// continued by the next run.
func Run(ctx context.Context, j Job) (Result, error) {
	if err := j.validate(); err != nil {
		return Result{Key: j.Key}, err
	}
	var forced []string
	for {
		r := &run{job: &j, res: Result{Key: j.Key}, forced: forced}
		again, err := r.attempt(ctx)
		if err != nil || !again {
			return r.res, err
		}
		forced = r.forced
	}
}

// run is one attempt at a job: from the look at the store to its end. It is
// started over when somebody else changed the workspace in between.
type run struct {
	job *Job
	res Result
	// forced are reasons to run that an earlier attempt met.
	forced []string

	// seen is the record that look found, nil if there is none.
	seen *cache.Record
	memo *memo
	// prev is the source tree that the workspace holds, nil if unknown.
	prev *source.Tree
	// tree is the source as it is now.
	tree *source.Tree

	// Set by begin.
	mount    *cache.Mount
	hold     *cache.Hold
	log      []byte // of a cached run
	unsynced *cache.Unsynced
}

func (r *run) attempt(ctx context.Context) (again bool, err error) {
	if err := r.look(ctx); err != nil {
		return false, err
	}
	if err := r.scan(ctx); err != nil {
		return false, err
	}
	why := r.why()
	again, err = r.begin(ctx, why)
	if again || err != nil {
		return again, err
	}
	if len(why) == 0 {
		return r.replay(ctx)
	}
	return false, r.build(ctx)
}

func (r *run) why() []string {
	why := []string{}
	if r.seen == nil {
		why = append(why, "first")
	} else {
		why = append(why, r.memo.why(r.job, r.tree.Digest())...)
		why = r.nameSources(why)
		why = append(why, r.forced...)
	}
	r.res.Why, r.res.SourceDigest = why, r.tree.Digest()
	return why
}

// namedSources is how many of the source's paths that changed are named.
const namedSources = 5

// nameSources puts the first paths that changed behind the reason "source".
func (r *run) nameSources(why []string) []string {
	at := slices.Index(why, "source")
	if at < 0 || r.prev == nil || r.prev.Digest() != r.memo.Source {
		return why // what the last run saw is not known any more
	}
	var named []string
	r.res.SourceChanges = 0
	for path := range source.Changed(r.prev, r.tree) {
		if r.res.SourceChanges++; len(named) < namedSources {
			named = append(named, "source:"+path)
		}
	}
	return slices.Insert(why, at+1, named...)
}

// letGo ends mount and hold.
func (r *run) letGo() error {
	var errs []error
	if r.mount != nil {
		errs = append(errs, Unmount(r.mount))
		r.mount = nil
	}
	if r.hold != nil {
		errs = append(errs, r.hold.Release())
		r.hold = nil
	}
	return errors.Join(errs...)
}
