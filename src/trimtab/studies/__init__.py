"""The evidence: tasks that methods are compared on, and one study per paper."""
