package cache

// HoldPath is where the hold of a record lies.
var HoldPath = holdPath
