//! What a kernel's configuration and symbols say.

/// The lines of `fragment` that `config`, a kernel's `.config`, has otherwise.
/// Kconfig drops without a word what depends on something that is off.
pub fn unmet<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let has = |wanted: &str| config.lines().any(|line| line == wanted);
    let is_met = |line: &str| match line
        .strip_prefix("# ")
        .and_then(|rest| rest.strip_suffix(" is not set"))
    {
        // Off is also what is not there at all.
        Some(name) => !config
            .lines()
            .any(|line| line.starts_with(&format!("{name}="))),
        None => has(line),
    };
    fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_") || line.starts_with("# CONFIG_"))
        .filter(|line| !is_met(line))
        .collect()
}

/// Whether a `System.map` has a function of exactly that name, and no copy of it
/// that the compiler made for those who call it (`f.constprop.0`).
pub fn has_function(map: &str, name: &str) -> bool {
    let functions = || {
        map.lines().filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            matches!(words.next(), Some("t" | "T")).then(|| words.next())?
        })
    };
    let is_copy = |found: &str| {
        found
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('.') && !rest.starts_with(".cold"))
    };
    functions().any(|found| found == name) && !functions().any(is_copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_was_dropped_is_named() {
        let fragment = "# Why.\n\nCONFIG_A=y\nCONFIG_B=\"x\"\n# CONFIG_C is not set\n\
                        # CONFIG_D is not set\n# CONFIG_E is not set\n";
        let config = "CONFIG_A=y\nCONFIG_B=\"y\"\n# CONFIG_C is not set\nCONFIG_D=y\nCONFIG_EE=y\n";
        assert_eq!(
            unmet(fragment, config),
            ["CONFIG_B=\"x\"", "# CONFIG_D is not set"]
        );
        assert!(unmet("CONFIG_A=y\n", config).is_empty());
    }

    #[test]
    fn a_function_counts_under_its_own_name_only() {
        let map = "ffffffff81000000 t f.isra.0\nffffffff81000010 d g\nffffffff81000020 T h\n";
        assert!(!has_function(map, "f") && !has_function(map, "g"));
        assert!(has_function(map, "h"));
        assert!(!has_function(
            &format!("{map}ffffffff81000030 t h.constprop.0\n"),
            "h"
        ));
        assert!(has_function(
            &format!("{map}ffffffff81000030 t h.cold\n"),
            "h"
        ));
    }
}
