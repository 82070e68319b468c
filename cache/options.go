package cache

import (
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"

	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// The types of a record are the store's; embedders need this package only.
type (
	// ID names a record.
	ID = metadata.ID
	// Record is all that is known of a snapshot, as a copy.
	Record = metadata.Record
	// Value is a named datum of a record, with an optional index key.
	Value = metadata.Value
	// State is a stage in the life of a record.
	State = metadata.State
)

// The states of a record; see package metadata for what they mean.
const (
	Mutable   = metadata.Mutable
	Committed = metadata.Committed
	Finalized = metadata.Finalized
	Lazy      = metadata.Lazy
)

// Options say where a cache lies and how it behaves. Only Root is required.
type Options struct {
	// Root is the directory of the store. Open makes it, mode 0700, unless
	// NoCreate is set. It must belong to the caller and be writable by
	// nobody else.
	Root string
	// NoCreate makes Open fail with NotFound where there is no store.
	NoCreate bool
	// ReadOnly opens an existing store to look at it: nothing is written,
	// nothing is settled, and every changing call is refused, as is a mount
	// that other processes would see.
	ReadOnly bool

	// Driver is the snapshot driver. Nil lets Open take the one that the
	// store was made with or, for a new store, DriverName. A Driver that is
	// handed in stays the caller's to close.
	Driver snapshot.Driver
	// DriverName is "overlay", "native", or empty: whatever the store has
	// and, for a new store, whatever a trial mount allows. Asking for another
	// driver than the store has is FailedPrecondition.
	DriverName string

	// Content is where layer blobs are kept. Nil is a store below Root, which
	// is ours alone and is made when it is first needed. One that is handed in
	// is the caller's to close and may be shared: blobs in it are labelled with
	// what we use, containerd's collector keeps them by these labels, and
	// nothing without our label is ever removed, so that a store that keeps no
	// labels keeps all blobs.
	Content content.Store
	// ContentGC says that Content has a garbage collector, as containerd's
	// metadata store has: blobs are given up by their labels only, never
	// deleted.
	ContentGC bool
	// LayerLimits bound what one layer may hold that is extracted; Bytes also
	// what is unpacked of a blob to read or to convert it. The zero
	// value has defaults.
	LayerLimits layer.Limits

	// LockTimeout bounds the wait for another process that has the store
	// open, one second if zero. The error names that process.
	LockTimeout time.Duration
	// OnWait is called once when that wait lasts longer than a second.
	OnWait func(metadata.Holder)
	// Command is what others are told about this process, os.Args if empty.
	Command string

	// Unconfirm changes, in the transaction of a reopen, the index page of the
	// record's stored hash tree (the attachment TreeIndex), so that what it
	// says is validated before it is believed: contenthash.UnconfirmStored.
	// Where it is nil, or gives nil, the attachments below TreePrefix go.
	Unconfirm func(index []byte) ([]byte, error)

	// SyncInterval is how long committed data may wait until a sync in the
	// background writes it to the disk and marks it durable; Close does the
	// rest. DefaultSyncInterval if zero; negative leaves it to Sync. With it
	// go the sizes of records: they are measured in the background soon after
	// each commit, or only when somebody asks.
	SyncInterval time.Duration
	// Collect, if not nil, prunes in the background.
	Collect *CollectOptions
	// Disk gives the figures that policies go by; nil asks the file system.
	Disk func() (policy.Disk, error)

	// PrivateMounts says that the process is in a mount namespace that dies
	// with it: its mounts need no cleaning after a kill.
	PrivateMounts bool
	// NoMounts says that the process cannot mount. A Mount is then the
	// driver's own directory, if it has one, and nothing enforces that it is
	// only read.
	NoMounts bool
	// FlushInterval is how long use counts may stay in memory only; the
	// store's default if zero.
	FlushInterval time.Duration

	// Logger hears what Open settles and what goes wrong in the background.
	// Nil is silence.
	Logger *slog.Logger
	// Now is the clock; time.Now if nil.
	Now func() time.Time
	// BootID tells one boot of the machine from the next; the kernel's if
	// empty.
	BootID string
	// Step is called before each durable step, with a name for it, and an
	// error from it fails that step: the seam of tests that crash or starve
	// the cache at every point.
	Step func(name string) error
	// contentSeam is another one: what stands for the content store of our own.
	contentSeam func(content.Store) content.Store
}

func (o *Options) setDefaults() {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.BootID == "" {
		// Without /proc every open is taken for one in another boot, which
		// is slower but never wrong.
		id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
		o.BootID = strings.TrimSpace(string(id))
	}
	if o.Step == nil {
		o.Step = func(string) error { return nil }
	}
	if o.Command == "" {
		o.Command = strings.Join(os.Args, " ")
	}
}
