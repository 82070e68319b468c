package layer_test

import (
	"bytes"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/layer"
)

// TestSameAsContainerd applies layers that lead through links and over what is
// there. The cases are those of containerd's own tests.
func TestSameAsContainerd(t *testing.T) {
	needRoot(t)
	passwd := []ent{{name: "etc/", typ: '5', mode: 0o770}, file("/etc/passwd", "inside")}
	for _, tt := range []struct {
		name        string
		base, layer []ent
	}{
		{"absolute link", nil, append(passwd, symlink("localetc", "/etc"), file("/localetc/unbroken", "x"))},
		{"link up and out", nil, append(passwd, directory("dummy"), symlink("localetc", "/dummy/../etc"), file("/localetc/unbroken", "x"))},
		{"two links", nil, append(passwd, directory("dummy"), symlink("/dummy/etc", "/etc"), symlink("localetc", "./dummy/etc"), file("/dummy/etc/unbroken", "x"))},
		{"emptied through a link", nil, append(passwd, symlink("localetc", "/etc"), file("/localetc/passwd", ""))},
		{"hard link through a link", nil, append(passwd, directory("breakouts"), symlink("breakouts/d1", "../../etc"), hardlink("breakouts/mypasswd", "/breakouts/d1/passwd"))},
		{"hard link down and out", nil, append(passwd, directory("breakouts"), directory("downandout"), symlink("breakouts/d1", "../downandout/../../etc"), hardlink("breakouts/mypasswd", "/breakouts/d1/passwd"))},
		{"hard link far up", nil, append(passwd, symlink("localetc", "../../../../../../../etc"), hardlink("localpasswd", "/localetc/passwd"))},
		{"direct hard link up", nil, append(passwd, hardlink("localpasswd", "../../../../../etc/passwd"))},
		{"link in the place of the root", nil, append(passwd, symlink("..", "/etc/"), symlink("", "/etc"), hardlink("localpasswd", "/etc/passwd"))},
		{"link over a parent", nil, append(passwd, symlink("localetc/sub/..", "/etc/"), hardlink("/localetc/localpasswd", "/etc/passwd"))},
		{"link over a directory", append(passwd, directory("localetc"), file("localetc/localpasswd", "lower")), []ent{symlink("localetc", "/etc"), hardlink("/localetc/localpasswd", "/etc/passwd")}},
		{"directory over a link", append(passwd, symlink("localetc", "/etc")), []ent{directory("/localetc/"), hardlink("/localetc/localpasswd", "/etc/passwd")}},
		{"whiteout of a link", append(passwd, symlink("localetc", "/etc")), []ent{whiteout("localetc")}},
		{"dotted whiteout", passwd, []ent{{name: "dne/../.wh.etc", typ: '0'}}},
		{"opaque", append(passwd, file("etc/shadow", "")), []ent{opaque("etc"), file("etc/group", "x")}},
		{"opaque, out of order", append(passwd, file("etc/shadow", "")), []ent{file("etc/group", "x"), opaque("etc")}},
		{"link over a path", nil, []ent{directory("foo"), directory("foo/tmp"), file("foo/tmp/f", "1"), symlink("foo", "/"), file("foo/tmp/f", "2"), directory("foo"), directory("foo/tmp"), file("foo/tmp/f", "3")}},
		{"hard link to a link whose target comes later", nil, append(passwd[:1:1], symlink("localpasswd", "/etc/passwd"), hardlink("dup", "localpasswd"), file("/etc/passwd", "after"))},
		{"directories without entries", passwd, []ent{directory("/etc/subdir"), directory("/etc/subdir2/more"), directory("/other/noparent-1/1")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ours, theirs := mkdir(t), mkdir(t)
			for _, b := range [][]byte{pack(t, tt.base...), pack(t, tt.layer...)} {
				apply(t, ours, b, layer.ApplyOptions{})
				_, err := archive.Apply(t.Context(), theirs, bytes.NewReader(b))
				require.NoError(t, err)
			}
			require.Equal(t, dump(t, theirs, dumpOptions{noDirTimes: true}), dump(t, ours, dumpOptions{noDirTimes: true}))
		})
	}
}

// TestLayersOfContainerd applies what containerd writes of random changes.
func TestLayersOfContainerd(t *testing.T) {
	needMounts(t)
	rapid.Check(t, func(t *rapid.T) {
		before, after := mkdir(t), mkdir(t)
		count := 0
		for range rapid.IntRange(0, 12).Draw(t, "changes before") {
			change(t, before, &count)
		}
		copyTree(t, after, before)
		for range rapid.IntRange(0, 12).Draw(t, "changes") {
			change(t, after, &count)
		}
		var b bytes.Buffer
		if err := archive.WriteDiff(t.Context(), &b, before, after); err != nil {
			t.Skip(err) // it minds hard links to sockets
		}
		ours, theirs := mkdir(t), mkdir(t)
		copyTree(t, ours, before)
		copyTree(t, theirs, before)
		_, err := archive.Apply(t.Context(), theirs, bytes.NewReader(b.Bytes()))
		require.NoError(t, err)
		apply(t, ours, b.Bytes(), layer.ApplyOptions{Devices: layer.DevicesMade})
		// It writes no user.* attributes. Of those that a directory has already
		// its Apply leaves all in a tree and none in an upper directory; ours,
		// which shows the same in both, none.
		o := dumpOptions{noDirTimes: true, noUser: true}
		require.Equal(t, dump(t, theirs, o), dump(t, ours, o), "%q", listing(t, b.Bytes()))
	})
}
