//! Another configuration for the running agent: read, compared, and then taken over as a whole or not at all.
//!
//! Whatever can go wrong is tried before anything is changed; what follows cannot fail, and nothing of it waits for the
//! broker or the store. Reloads come one after the other, because one task does them; a stop waits
//! for the one that goes on.

use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::Agent;
use super::settings::{orders, scope, store_settings};
use crate::config::{self, Config, Difference, Needs, Problems};
use crate::control::wire::{Answer, Problem};
use crate::service::Service;
use crate::uplink::connection::Orders;

/// Differences that are told, and problems; the others are only counted.
const TOLD_MAX: usize = 500;

/// Why the agent goes on with the configuration it has.
enum Kept {
    /// It is not a configuration.
    Bad(Problems),
    /// These cannot be changed while the agent runs.
    Restart(Vec<Difference>),
    /// Something that it names cannot be used.
    Unusable(String),
}

impl Agent {
    /// Reads the configuration again, goes on with it if it can, and says so: in the log, and to whoever asked.
    pub(super) async fn reload(&mut self, reply: Option<oneshot::Sender<Answer>>, service: &Service) {
        service.reloading();
        info!(file = %self.file.display(), "reading the configuration again");
        let answer = match self.look_at_file() {
            Err(kept) => keep(kept),
            Ok(None) => {
                info!("nothing has changed");
                Answer::Reloaded { changes: Vec::new(), warnings: Vec::new() }
            }
            Ok(Some((config, orders, differences))) => {
                let warnings = config.warnings();
                self.take_over(config, orders, service).await;
                let changes = told(&differences);
                changes.iter().for_each(|change| info!("changed: {change}"));
                warnings.iter().for_each(|warning| warn!("{warning}"));
                info!("the changed configuration is in force");
                Answer::Reloaded { changes, warnings }
            }
        };
        service.ready();
        if let Some(reply) = reply {
            // Whoever asked may have gone.
            let _gone = reply.send(answer);
        }
    }

    /// Everything that may fail. `None`: it is the configuration the agent has.
    fn look_at_file(&self) -> Result<Option<(Config, Orders, Vec<Difference>)>, Kept> {
        let config = config::load(&self.file).map_err(Kept::Bad)?;
        let differences = self.config.differences(&config);
        let restart: Vec<_> = differences.iter().filter(|one| one.needs == Needs::Restart).cloned().collect();
        if !restart.is_empty() {
            return Err(Kept::Restart(restart));
        }
        if differences.is_empty() {
            return Ok(None);
        }
        let orders = orders(&config, &self.speaker, self.faults)
            .map_err(|error| Kept::Unusable(format!("[gateway] base_topic: {error}")))?;
        for broker in orders.brokers.iter().filter(|broker| !self.orders.borrow().brokers.contains(broker)) {
            // What is connected is not given up for a password or certificate that cannot even be read.
            broker.look_at_files().map_err(Kept::Unusable)?;
        }
        Ok(Some((config, orders, differences)))
    }

    /// In the order of the flow, from the field up.
    async fn take_over(&mut self, config: Config, orders: Orders, service: &Service) {
        self.store.change(store_settings(&config, self.faults));
        self.field.change(&config, service).await;
        self.scope.send_replace(scope(&config, &orders.presence, &self.field));
        self.orders.send_if_modified(|known| {
            let changed = known.brokers != orders.brokers;
            *known = orders;
            changed
        });
        self.config = config;
    }
}

fn keep(kept: Kept) -> Answer {
    match kept {
        Kept::Bad(problems) => {
            let reason = problems.to_string();
            let count = problems.0.len();
            let problems: Vec<Problem> = problems.0.into_iter().take(TOLD_MAX).map(problem).collect();
            for Problem { file, line, column, message, help } in &problems {
                let place = [*line, *column].into_iter().flatten().map(|number| format!(":{number}"));
                let (place, help) = (place.collect::<String>(), help.as_deref().unwrap_or_default());
                error!(help, "{file}{place}: {message}");
            }
            error!(problems = count, "the configuration is bad: the agent goes on with the one it has");
            Answer::NotReloaded { reason, problems, restart: Vec::new() }
        }
        Kept::Restart(differences) => {
            let restart: Vec<String> = differences.into_iter().map(|one| one.words).collect();
            let reason = format!(
                "{} cannot be changed while the agent runs: nothing was changed; restart it (systemctl restart fieldpost), \
                 or take that back",
                restart.join(", and ")
            );
            error!("{reason}");
            Answer::NotReloaded { reason, problems: Vec::new(), restart }
        }
        Kept::Unusable(why) => {
            let reason = format!("{why}; nothing was changed");
            error!("the configuration cannot be used, and the agent goes on with the one it has: {reason}");
            Answer::NotReloaded { reason, problems: Vec::new(), restart: Vec::new() }
        }
    }
}

fn problem(problem: config::Problem) -> Problem {
    let number = |spot: fn(&config::Spot) -> usize| problem.spot.as_ref().map(|of| spot(of) as u64);
    Problem {
        file: problem.file.display().to_string(),
        line: number(|spot| spot.line),
        column: number(|spot| spot.column),
        message: problem.message,
        help: problem.help,
    }
}

fn told(differences: &[Difference]) -> Vec<String> {
    let mut told: Vec<String> = differences.iter().take(TOLD_MAX).map(Difference::to_string).collect();
    if differences.len() > TOLD_MAX {
        told.push(format!("and {} more", differences.len() - TOLD_MAX));
    }
    told
}
