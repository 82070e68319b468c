package bench

// For the tests.
var (
	Transactions = transactions
	WithLoopDisk = withLoopDisk
)
