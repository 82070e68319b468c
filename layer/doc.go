// Package layer applies OCI layer tars to directories and writes them from
// directories. It knows no cache, no store and no mounts.
//
//	Apply, ApplyBlob          a tar, or a blob with its descriptor, into a directory
//	Write, WriteBlob          from an overlay's upper directory (Upper) or from two trees (Trees)
//	Decompress, Compress      gzip, zstd, or none
//	Verify                    digest and size while reading
//
// # Applying
//
// A layer is a changeset (OCI image spec, layer.md). Applying it to a whole tree
// (Plain) and applying it to the empty upper directory of an overlay over that
// tree show the same. All entries count in their order, and of several with one
// name the last one wins:
//
//   - Names are paths below the root, which is its own parent: "/a", "./a" and
//     "../a" are "a". What names the root itself is ignored, as by other engines:
//     the root's own attributes belong to no layer.
//   - Every file is reached by descriptors below the root without following a
//     link. In the directory part of a name, a symbolic link that this layer
//     itself made is followed inside the tree, as if its root were /, which
//     engines agree on. One that lies below is not: a directory takes its place,
//     as stacking the layer by itself would show.
//   - A whiteout, or an opaque directory, hides what the layers below have, and
//     never what its own layer has, whichever comes first. aufs's own files
//     (".wh..wh." and more) are left out; other names with ".wh." in front are
//     refused.
//   - A directory without an entry looks as the one below, or if there is none is
//     0755, of the calling user, and of the time 0. A directory with an entry has
//     just the attributes of the entry. All directories have their times when
//     everything has been made in them.
//   - A hard link is to the file that the tree shows under the target's name, a
//     symbolic link itself, or else to one that comes later. In an upper directory
//     a file that only lies below is copied up first. The entry's attributes do
//     not count, since they are the file's.
//   - Extended attributes are taken from PAX records SCHILY.xattr.*: user.* but
//     not user.overlay.*, POSIX ACLs, security.capability. Others (trusted.*,
//     labels of a machine's policy) are left out and counted.
//   - Modes are kept with their set-id bits, times to the nanosecond, GNU and PAX
//     sparse files with their holes.
//
// A layer that says what no layer may say, or more than Limits, ends in an
// error that names the entry. Memory does not grow with the number of entries,
// but for some 20 bytes an entry when a tree that is not empty is applied to,
// and for hard links that come before their files.
//
// An ordinary user sets Owners to OwnersCaller and Devices to DevicesSkipped:
// then nothing needs a privilege, and files belong to that user, as with tar.
// The whiteouts of overlayfs may be made by anybody (since Linux 5.8).
//
// # Writing
//
// A layer is written in one form: directories before what is in them, names in
// the order of their bytes, in each directory an opaque mark and the whiteouts
// first; PAX headers where a plain one cannot say it; times in whole seconds,
// unless told otherwise; no names of users; hard links to the first name that
// the layer has of a file; whiteouts with mode, owner and time 0. What changed
// in a directory brings an entry for it and those above it; a directory whose
// time alone changed has none. Sockets and trusted.* attributes are left out,
// holes are zeros.
//
// Upper and Trees give the same bytes for the same change, with one exception. A
// directory that was removed and made again is opaque in an upper directory,
// and hides whatever it is stacked on; two trees only tell which names are
// gone. (Where a change of one name parts it from other names of its file, both
// give the same tree, too, but may differ in which name has the entry.) An upper
// directory whose Parents are not told is written as it stands, with all that
// is needless.
package layer
