package bench

// Transactions is transactions, for the tests.
var Transactions = transactions
