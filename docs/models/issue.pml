/* Issuing, take-over, sweeping, abandonment and restart, without loss of commits (that is recovery.pml). protocols: Issue and takeover.

   One request key K. Writers w: 0 is ca1, 1 is ca2, 2 is ca1 after a restart, 3 is ca2's sweeper. Writer w proposes serial w+1 and its signature is
   number w+1. A commit may succeed, succeed with its answer lost, or stay under way and land late, also after its writer has died.

   Each step carries the name of the function it stands for. What is not here: batches (jobs of one batch share transactions and fsyncs, and every step
   below is per job), the change feed (lane.pml), policy (the recheck passes or refuses at will).

   Rules that can be removed: -DMEMRELEASE -DNOREQKEY -DSIGNFIRST -DNOADOPTJOURNAL -DABSEP -DTELLFIRST -DNOBURY -DNODONE */

#define ABANDONED 9
#ifndef ASKS
#define ASKS 2                  /* times that a node is asked for K */
#endif
byte req=0;                     /* UNIQUE(req, ver): the serial that owns K; 0 none */
bool intent[5];                 /* intent row of serial s */
byte out[5];                    /* outcome row of serial s: 0 none, 1..4 the certificate with that signature, 9 abandoned */
bool pI[4]; byte pO[4]; bool pA[4];  /* commits of writer w under way: its intent; its outcome for serial pO, abandoned if pA */
bool jI0[5];                    /* journal of ca1 before its restart: intent */
bool jI1[5]; bool jI2[5]; bool jI3[5]; /* of the other writers */
bool jD[5];                     /* some journal has done, with the bytes, for serial s */
byte rel[5]; byte relK=0; bool told[5]; /* what clients were given: certificate per serial, serial for K, "abandoned" */
bool crashed=false, recovered=false;
#ifdef ABSEP
bool ab2[5];
#endif

/* db.InsertIntents: INSERT IGNORE, so a taken request key or serial leaves everything as it was */
inline landIntent(s_) {
#ifdef NOREQKEY
  if :: !intent[s_] -> req=s_; intent[s_]=true :: else fi
#else
  if :: req==0 && !intent[s_] -> req=s_; intent[s_]=true :: else fi
#endif
}
/* db.Lane.Append of an outcome: the foreign key demands the intent, the primary key admits one */
inline landOutcome(s_,v_) { if :: intent[s_] && out[s_]==0 -> out[s_]=v_ :: else fi }

inline journalIntent(w_,s_) { if :: w_==0 -> jI0[s_]=true :: w_==1 -> jI1[s_]=true :: w_==2 -> jI2[s_]=true :: w_==3 -> jI3[s_]=true fi }
#define JOURNALLED(w,s) ((w==0 && jI0[s]) || (w==1 && jI1[s]) || (w==2 && jI2[s]) || (w==3 && jI3[s]))

proctype Node(byte w) { byte s=0; byte o=0; byte rounds=0;
{
  if :: w==2 -> recovered                                   /* Engine.Run: recover before anything is admitted */
     :: w==3 -> goto SWEEP
     :: else fi;
BEGIN:                                                      /* Engine.issue, then runBatch */
  atomic { rounds++; journalIntent(w,w+1) };                /* intend: journal.Intent, fsynced */
#ifdef SIGNFIRST
  if :: w!=3 -> assert(intent[w+1]) :: else fi;             /* the HSM is asked while the intent is still on its way to the record */
#endif
INTEND:
  if                                                        /* intend: InsertIntents */
  :: atomic { true -> landIntent(w+1) }
  :: atomic { true -> landIntent(w+1) }; goto INTEND                /* committed, answer lost: the same rows again */
  :: atomic { !pI[w] -> pI[w]=true }; goto INTEND           /* under way, may land late */
  fi;
#ifdef NOREQKEY
  atomic { s=w+1;
#else
  atomic { s=req;                                           /* the row that owns the key, and what became of it */
#endif
  o=out[s];
  if :: s==w+1 && rounds==1 -> o=0; goto SIGN
     :: else -> skip fi;                                    /* adopt, readBack: another's row, or one of an earlier run */
  if :: o!=0 -> o=0; goto READBACK :: else -> skip fi };
TAKEOVER:                                                   /* takeOver, recheck: policy may have changed */
  if
  :: atomic { true ->
#ifndef NOADOPTJOURNAL
     journalIntent(w,s);                                    /* the adopted intent goes into this node's journal too */
#endif
     goto SIGN }
  :: goto ABANDON
  fi;
SIGN:                                                       /* sign: journal.Sign, then the HSM, then certify */
  atomic { assert(JOURNALLED(w,s));                         /* I10 */
           assert(intent[s]) };                             /* I1: signatures are of intents on record */
CONCLUDE:                                                   /* conclude: outcome and feed row in one transaction */
  if
  :: atomic { true -> landOutcome(s,w+1) }                          /* mine, or a duplicate: somebody finished it */
  :: atomic { true -> landOutcome(s,w+1) }; goto CONCLUDE
  :: atomic { pO[w]==0 -> pO[w]=s }; goto CONCLUDE
  fi;
READBACK:                                                   /* release: readBack by request key on another database node */
  atomic { s=req; o=0; if :: s!=0 -> o=out[s] :: else -> skip fi;
  if :: s==0 || o==0 -> goto FINISH                         /* again: only a loss of commits leads here, see recovery.pml */
     :: o==ABANDONED -> goto TELL                           /* judge: 409 request-abandoned */
     :: else -> skip fi };
#ifdef MEMRELEASE
  o=w+1;                                                    /* what was signed instead of what the row says */
#endif
  atomic {
#ifndef NODONE
    jD[s]=true;                                             /* release: journal.Done, fsynced; a crash between this and the answer is one before both */
#endif
                                                            /* finish: the client has it */
    assert(jD[s]);                                          /* what is released can be put back */
    assert(rel[s]==0 || rel[s]==o);                         /* I2: one certificate per serial */
    assert(relK==0 || relK==s);                             /* I2: one serial per request */
    assert(out[s]==o);                                      /* acknowledged is stored */
    assert(!told[s]);                                       /* nobody was told that it was abandoned */
#ifdef ABSEP
    assert(!ab2[s]);
#endif
    rel[s]=o; relK=s; o=0 };
  if :: rounds<ASKS && w!=3 -> goto BEGIN                      /* the client asks again under the same key */
     :: goto FINISH fi;
SWEEP:                                                      /* sweepSome: an intent that has waited too long */
  if :: atomic { intent[1] && out[1]==0 -> s=1 }
     :: atomic { intent[2] && out[2]==0 -> s=2 }
     :: atomic { intent[3] && out[3]==0 -> s=3 }
     :: goto FINISH fi;
  if :: s==req -> goto TAKEOVER
     :: else -> goto ABANDON fi;                            /* a row that a restart reconstructed */
ABANDON:                                                    /* abandon: the outcome takes the key a certificate would need */
#ifdef TELLFIRST
  atomic { assert(rel[s]==0); told[s]=true };
#endif
#ifdef ABSEP
  atomic { if :: out[s]==0 -> ab2[s]=true; told[s]=true :: else fi }; goto FINISH;
#endif
  if
  :: atomic { true -> landOutcome(s,ABANDONED) }
  :: atomic { true -> landOutcome(s,ABANDONED) }; goto ABANDON
  :: atomic { pO[w]==0 -> pO[w]=s; pA[w]=true }; goto ABANDON
  fi;
  o=out[s];                                                 /* read back */
  if :: o!=ABANDONED -> goto FINISH :: else fi;             /* another node finished it: the client is told to repeat */
TELL:
  atomic { assert(rel[s]==0); told[s]=true };
FINISH: skip
} unless { w==0 && crashed } }

/* Engine.recover, settle, bury: ca1 comes back and brings the database to know what its journal knows */
proctype Recover() { byte s=1;
  crashed;
  do
  :: s>3 -> break
  :: s<=3 && jI0[s] && !jD[s] && !intent[s] ->              /* find: causal */
#ifndef NOBURY
     atomic { if :: !intent[s] -> intent[s]=true :: else fi };  /* bury: without request key; had it landed meanwhile, the row stays */
     atomic { landOutcome(s,ABANDONED) };                   /* abandon; a duplicate is somebody's outcome */
#endif
     s++
  :: s<=3 && (!jI0[s] || jD[s] || intent[s]) -> s++
  od;
  recovered=true }

proctype Net() {
endN: do
  :: atomic { pI[0] -> pI[0]=false; assert(!recovered || req!=0 || intent[1]); landIntent(1) }  /* a dead incarnation's commit adds nothing any more */
  :: atomic { pI[1] -> pI[1]=false; landIntent(2) }
  :: atomic { pI[2] -> pI[2]=false; landIntent(3) }
  :: atomic { pO[0]!=0 -> if :: pA[0] -> landOutcome(pO[0],ABANDONED) :: else -> landOutcome(pO[0],1) fi; pO[0]=0; pA[0]=false }
  :: atomic { pO[1]!=0 -> if :: pA[1] -> landOutcome(pO[1],ABANDONED) :: else -> landOutcome(pO[1],2) fi; pO[1]=0; pA[1]=false }
  :: atomic { pO[2]!=0 -> if :: pA[2] -> landOutcome(pO[2],ABANDONED) :: else -> landOutcome(pO[2],3) fi; pO[2]=0; pA[2]=false }
  :: atomic { pO[3]!=0 -> if :: pA[3] -> landOutcome(pO[3],ABANDONED) :: else -> landOutcome(pO[3],4) fi; pO[3]=0; pA[3]=false }
  od }

proctype Crash() { if :: crashed=true :: skip fi }

init { atomic {
  run Node(0); run Node(1); run Net();
#ifndef NOCRASH
  run Node(2); run Recover(); run Crash();
#endif
#ifndef NOSWEEP
  run Node(3);
#endif
  skip } }
