package policy_test

import (
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache/policy"
)

func TestFilters(t *testing.T) {
	r := &policy.Record{
		ID: "abc", State: "finalized", Op: "layer", Type: "regular", Key: "app", Description: "make, then test",
		Labels:   map[string]string{"team": "a", "prio": "7", "io.example/ttl": "36h", "a.b": "x", "cap": "2MB"},
		Retained: true, Size: 5_000_000, Created: now.Add(-48 * time.Hour), LastUsed: now.Add(-2 * time.Hour), Uses: 3, Cost: time.Minute,
	}
	for text, want := range map[string]bool{
		"id==abc": true, "state!=mutable,op==layer": true, "type~=^reg": true, "key": true, "retained==true": true,
		`description=="make, then test"`: true, `description~=/make, then/,type==regular`: true, `description~="a,b"`: false,
		"labels.team==a": true, "labels.team": true, "labels.none": false, `labels."io.example/ttl"==36h`: true, `labels."a.b"==x`: true,
		"size>1MB": true, "size>=5MB": true, "size<5MB": false, "size==5000000": true, "size!=5MB": false, "size>4MiB, uses<=3": true,
		"age>1d": true, "age<2d": false, "idle>1h": true, "idle>=3h": false, "uses>2": true, "uses==3": true, "uses!=3": false,
		"cost>=1m": true, "cost<60s": false,
		"labels.prio>6": true, "labels.prio<7": false, "labels.prio>1h": false, `labels."io.example/ttl">1d`: true,
		`labels."io.example/ttl"<=1d`: false, "labels.cap>1MB": true, "labels.none<5": false, `description=="a~=("`: false, `labels."~=["==x`: false, "labels.team>1": false,
	} {
		f, err := policy.ParseFilters(text)
		require.NoError(t, err, text)
		require.Equal(t, want, f.Match(r, now), text)
		require.Equal(t, strings.Contains(text, "size"), f.LooksAtSize(), text)
	}
	f, err := policy.ParseFilters("id==x", "id==abc")
	require.NoError(t, err)
	require.True(t, f.Match(r, now))
	f, err = policy.ParseFilters()
	require.NoError(t, err)
	require.True(t, f.Match(r, now))

	unknown := *r
	unknown.Size = -1
	for _, text := range []string{"size<1GB", "size>0", "size!=0"} {
		f, err := policy.ParseFilters(text)
		require.NoError(t, err)
		require.False(t, f.Match(&unknown, now), "nobody knows the size")
	}
}

func TestBadFiltersPointAtThePlace(t *testing.T) {
	for text, at := range map[string]int{
		"": 0, "type==": 6, "type=regular": 4, "type==regular,": 14, ",type==a": 0, "colour==red": 0, "labels.a.b==x": 0, "labels.a.b>1": 10,
		"id==x,colour==red": 6, "size>big": 5, "type==a,size>10%": 13, "uses<-1": 5, "idle>3": 6, "age>": 4,
		"type~=[": 6, `type~="["`: 6, "labels.prio>high": 12, "type>5": 4, "size": 0, "size~=5": 0, `type=="a`: 6,
	} {
		_, err := policy.ParseFilters(text)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, text)
		var fe *policy.SyntaxError
		require.ErrorAs(t, err, &fe, text)
		require.Equal(t, at, fe.At, "%s: %v", text, err)
		require.NotEmpty(t, fe.Reason, text)
		require.NotEmpty(t, fe.Example, text)
		require.Equal(t, text, fe.Text)
		if _, err := policy.ParseFilters(strings.Split(fe.Example, " or ")[0]); err != nil {
			t.Errorf("%s: the example is wrong, too: %v", text, err)
		}
	}
}

// TestUnquotedBlanks: a shell takes the quotes of a value away, and then the
// message says that it needs some.
func TestUnquotedBlanks(t *testing.T) {
	for text, at := range map[string]int{"description==two words": 16, "type==a,labels.a~=x\ty": 19} {
		_, err := policy.ParseFilters(text)
		var fe *policy.SyntaxError
		require.ErrorAs(t, err, &fe, text)
		require.Equal(t, at, fe.At, text)
		require.Contains(t, fe.Error(), `a value with blanks needs quotes; for example description=="two words"`)
	}
	for _, text := range []string{"ty pe==a", "type ==", "type==a "} {
		if _, err := policy.ParseFilters(text); err != nil {
			require.NotContains(t, err.Error(), "quotes", text)
		}
	}
}

func FuzzFilters(f *testing.F) {
	for _, s := range []string{`a=="b",size>1`, `labels."x"~=/y/`, `labels.a>1h,`, `type~=|a\||`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if filter, err := policy.ParseFilters(text); err == nil {
			filter.Match(&policy.Record{}, now)
		} else {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			_ = err.Error()
		}
	})
}

func TestFiles(t *testing.T) {
	var b strings.Builder
	require.NoError(t, policy.Write(&b, policy.Defaults()))
	got, err := policy.Read(strings.NewReader(b.String()))
	require.NoError(t, err)
	require.Equal(t, policy.Defaults(), got)

	got, err = policy.Read(strings.NewReader(`{"version":1,"policies":[{"name":"x","filters":["size>1MB"],"types":["a"],"all":true,
		"keep_duration":"2d12h","reserved_space":0,"max_used_space":"1GiB","min_free_space":"20%","target_space":12}]}`))
	require.NoError(t, err)
	keep := policy.Duration(60 * time.Hour)
	require.Equal(t, []policy.Policy{{
		Name: "x", Filters: []string{"size>1MB"}, Types: []string{"a"}, All: true, KeepDuration: &keep,
		Reserved: policy.Bytes(0), MaxUsed: policy.Bytes(1 << 30), MinFree: policy.Percent(20), Target: policy.Bytes(12),
	}}, got)

	got, err = policy.Read(strings.NewReader(`{"version":1,"policies":[{"by_label":"team","label_values":["a"],"unlabelled":true,"max_used_space":1}]}`))
	require.NoError(t, err)
	require.Equal(t, []policy.Policy{{ByLabel: "team", LabelValues: []string{"a"}, Unlabelled: true, MaxUsed: policy.Bytes(1)}}, got)
}

func TestBadFilesPointAtThePlace(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "line 1, column 1: the text ends too early",
		"{\n\"version\":1,":               "line 2, column 13: the text ends too early",
		"{\n \"version\": 1,\n x}":        "line 3, column 2: invalid character 'x'",
		`[1]`:                             "line 1, column 1: it is no object",
		`{"version":2,"policies":[{}]}`:   "line 1, column 12, version: version is 2, not 1",
		`{"policies":[{}]}`:               "version is missing",
		`{"version":1}`:                   "no policies",
		`{"version":1,"policies":{}}`:     "column 25, policies: there are no policies",
		`{"version":1,"rules":[]}`:        "column 14, rules: there is no such field, but version and policies",
		`{"version":1,"policies":[1]}`:    "column 26, policies[0]: it is no object",
		`{"version":1,"policies":[null]}`: "policies[0]: it is no object",
		"{\"version\":1,\n\"policies\":[{\"max_used\":1}]}":                      "line 2, column 14, policies[0].max_used: there is no such field, but name, filters,",
		"{\"version\":1,\"policies\":[{},{\n  \"max_used_space\": \"9 lots\"}]}": `line 2, column 21, policies[1].max_used_space: amount "9 lots", at 3 ("lots"): there is no unit "lots"; for example 10GB, 512MiB or 20%`,
		`{"version":1,"policies":[{"max_used_space":-5}]}`:                       `policies[0].max_used_space: amount "-5", at 1 ("-5"): a number is missing; for example`,
		`{"version":1,"policies":[{"max_used_space":1.5}]}`:                      `policies[0].max_used_space: amount "1.5"`,
		`{"version":1,"policies":[{"max_used_space":[]}]}`:                       `neither a string nor a number`,
		`{"version":1,"policies":[{"keep_duration":48}]}`:                        `policies[0].keep_duration: duration "48", at 1 ("48"): it is no string with a unit; for example "48h"`,
		`{"version":1,"policies":[{"keep_duration":"7d soon"}]}`:                 `at 3 (" soon"): a number`,
		`{"version":1,"policies":[{"all":"yes"}]}`:                               "policies[0].all: a string cannot be here, but a bool",
		`{"version":1,"policies":[{"all":true,"all":false}]}`:                    "policies[0].all: it is there twice",
		`{"version":1,"policies":[{}, {"filters":["type==a", "type=b"]}]}`:       `column 53, policies[1].filters[1]: filter "type=b", at 5 ("=b")`,
		`{"version":1,"policies":[{}]} {}`:                                       "column 31: there is something behind the object",
	} {
		_, err := policy.Read(strings.NewReader(text))
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, text)
		var fe *policy.FileError
		require.ErrorAs(t, err, &fe, text)
		require.ErrorContains(t, err, want, text)
	}
}

func FuzzRead(f *testing.F) {
	var defaults strings.Builder
	require.NoError(f, policy.Write(&defaults, policy.Defaults()))
	f.Add(defaults.String())
	f.Add(`{"version":1,"policies":[{"by_label":"team","label_values":["a"],"max_used_space":"20%"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		got, err := policy.Read(strings.NewReader(text))
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			return
		}
		// What was understood is written so that it is understood again.
		var b strings.Builder
		require.NoError(t, policy.Write(&b, got))
		again, err := policy.Read(strings.NewReader(b.String()))
		require.NoError(t, err, b.String())
		if diff := cmp.Diff(got, again, cmp.AllowUnexported(policy.Amount{}), cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
		if _, err := policy.Compute(policy.Usage{Records: []policy.Record{{ID: "a", Size: 1}}}, disk, got, now); err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		}
	})
}

func FuzzAmounts(f *testing.F) {
	for _, s := range []string{"10GB", "1.5 MiB", "20%", "-1", "1,5GB", "99999999EB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := policy.ParseAmount(text)
		if err != nil {
			placed(t, err, text)
			return
		}
		require.GreaterOrEqual(t, a.Of(disk), int64(0))
		again, err := policy.ParseAmount(a.String())
		require.NoError(t, err, a.String())
		require.Equal(t, a, again)
	})
}

func FuzzDurations(f *testing.F) {
	for _, s := range []string{"48h", "1w1d1h", "1.5d", "90m", "1h1d", "3µs", "9999999999w"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := policy.ParseDuration(text)
		if err != nil {
			placed(t, err, text)
			return
		}
		require.GreaterOrEqual(t, d, policy.Duration(0))
		again, err := policy.ParseDuration(d.String())
		require.NoError(t, err, d.String())
		require.Equal(t, d, again)
	})
}

// placed requires an error that points into text and can be printed.
func placed(t *testing.T, err error, text string) {
	t.Helper()
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	var se *policy.SyntaxError
	require.ErrorAs(t, err, &se)
	require.Equal(t, text, se.Text)
	require.GreaterOrEqual(t, se.At, 0)
	require.LessOrEqual(t, se.At, len(text))
	require.NotEmpty(t, se.Reason)
	require.Contains(t, err.Error(), "for example "+se.Example)
}

// TestBadAmountsPointAtThePlace and say what would be right, which is right.
func TestBadAmountsPointAtThePlace(t *testing.T) {
	for text, at := range map[string]int{
		"": 0, "-1": 0, " big": 1, "10XB": 2, "10 XB": 3, "5e3": 1, "1.2.3MB": 0, "101%": 0, "5%%": 1, "1,5GB": 1, "99999999EB": 0, "NaN%": 0, "%": 0,
	} {
		_, err := policy.ParseAmount(text)
		placed(t, err, text)
		var se *policy.SyntaxError
		require.ErrorAs(t, err, &se)
		require.Equal(t, at, se.At, "%v", err)
		for _, example := range strings.Split(strings.ReplaceAll(se.Example, " or ", ", "), ", ") {
			_, err := policy.ParseAmount(example)
			require.NoError(t, err)
		}
	}
	for text, at := range map[string]int{
		"": 0, "5": 1, "-1h": 0, "1y": 1, "d": 0, "2d 3h": 2, "1d-1h": 1, "1h1d": 2, "1d1d": 2, "1..5h": 0, "9999999999w": 0, "1h5": 3, " soon": 1,
	} {
		_, err := policy.ParseDuration(text)
		placed(t, err, text)
		var se *policy.SyntaxError
		require.ErrorAs(t, err, &se)
		require.Equal(t, at, se.At, "%v", err)
		for _, example := range strings.Split(strings.ReplaceAll(se.Example, " or ", ", "), ", ") {
			_, err := policy.ParseDuration(example)
			require.NoError(t, err)
		}
	}
}

func TestAmountsAndDurations(t *testing.T) {
	d := policy.Disk{Total: 1000}
	for text, want := range map[string]int64{"0": 0, "10GB": 10e9, "1 KiB": 1024, "1.5MB": 1.5e6, "20%": 200, "0%": 0, "100 %": 1000} {
		a, err := policy.ParseAmount(text)
		require.NoError(t, err, text)
		require.Equal(t, want, a.Of(d), text)
		again, err := policy.ParseAmount(a.String())
		require.NoError(t, err)
		require.Equal(t, a, again)
	}
	for _, text := range []string{"", "-1", "1XB", "-5%", "101%", "NaN%", "%", "1,5GB", "99999999EB", "1e400"} {
		_, err := policy.ParseAmount(text)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, text)
		require.ErrorContains(t, err, "for example")
	}
	for text, want := range map[string]time.Duration{"0s": 0, "48h": 48 * time.Hour, "7d": 168 * time.Hour, "1w1d1h": 193 * time.Hour, "1.5d": 36 * time.Hour, "90m": 90 * time.Minute} {
		got, err := policy.ParseDuration(text)
		require.NoError(t, err, text)
		require.Equal(t, want, time.Duration(got), text)
		again, err := policy.ParseDuration(got.String())
		require.NoError(t, err)
		require.Equal(t, got, again)
	}
	for _, text := range []string{"", "5", "-1h", "1y", "d", "1d-1h", "NaNd", "9999999999w", "1h1d"} {
		_, err := policy.ParseDuration(text)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, text)
	}
}

// A message is one line, whatever stands in the filter.
func TestReasonIsOneLine(t *testing.T) {
	for _, text := range []string{"id==a\nb", "id==\x00", "id==a\r,type", "\n"} {
		_, err := policy.ParseFilters(text)
		var se *policy.SyntaxError
		require.ErrorAs(t, err, &se, "%q", text)
		require.False(t, strings.ContainsFunc(err.Error(), unicode.IsControl), "%q", err)
	}
}
