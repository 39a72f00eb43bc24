"""The examples that methods make of rows."""
