//! The `fieldpost` program: one call into the library, so that examples and tests can be the agent too.

fn main() -> std::process::ExitCode {
    fieldpost::cli::main()
}
