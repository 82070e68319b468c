package layer_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/layer"
)

func TestApplyMakesWhatTheEntriesSay(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	b := pack(t,
		directory("d/"), file("d/a", "hello"), symlink("d/l", "a"), hardlink("h", "d/a"), file("x/y/z", "deep"),
		ent{name: "suid", typ: '0', mode: 0o4755, uid: 7, gid: 8, pax: map[string]string{"SCHILY.xattr.user.k": "v"}},
		ent{name: "fifo", typ: '6', mode: 0o622},
	)
	out := apply(t, dir, b, layer.ApplyOptions{})
	require.EqualValues(t, 9, out.Entries)
	require.EqualValues(t, 9, out.Bytes)
	t.Log(dump(t, dir, dumpOptions{}))

	again := t.TempDir()
	b2 := write(t, layer.Trees{Upper: dir}, layer.WriteOptions{Nanoseconds: true})
	apply(t, again, b2, layer.ApplyOptions{})
	require.Equal(t, dump(t, dir, dumpOptions{}), dump(t, again, dumpOptions{}))
	require.Equal(t, b2, write(t, layer.Trees{Upper: again}, layer.WriteOptions{Nanoseconds: true}))
	require.Equal(t, []string{}, listing(t, write(t, layer.Trees{Lower: dir, Upper: again}, layer.WriteOptions{})))
}

func TestWhiteoutsInATree(t *testing.T) {
	dir := t.TempDir()
	apply(t, dir, pack(t, directory("d"), file("d/a", "1"), file("d/b", "2"), file("e/x", "3"), file("f", "4")), layer.ApplyOptions{Owners: layer.OwnersCaller})
	apply(t, dir, pack(t, file("d/c", "5"), opaque("d"), whiteout("e"), file("e/y", "6"), whiteout("none")), layer.ApplyOptions{Owners: layer.OwnersCaller})
	require.Equal(t, []string{"d/", "d/c", "e/", "e/y", "f"}, names(t, dir))
}
