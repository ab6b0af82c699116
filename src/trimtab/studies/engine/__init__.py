"""What a study is, how it is run, stored, judged and shown."""
