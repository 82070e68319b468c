package bench

// For the tests.
var (
	Transactions = transactions
	WithLoopDisk = withLoopDisk
)

// MemoryDir is memoryDir.
var MemoryDir = memoryDir
