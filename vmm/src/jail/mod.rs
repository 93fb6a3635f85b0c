//! Everything that the process gives up before the first guest instruction.
