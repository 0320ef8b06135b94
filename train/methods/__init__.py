"""Tuning methods, one module each: what the method trains, how that is saved, what memory it takes.

`base.TuningMethod` says what a method can bring. The classes of `method:` in a recipe are in
`headtune.train.config.methods` and `.continual`.
"""
